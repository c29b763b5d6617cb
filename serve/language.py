"""The language model deployment, and the ingress of a bundle's application: a task in, a reply out."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray.serve.handle import DeploymentHandle

from serve.bundles import Source, open_bundle
from serve.pacing import FEWEST
from serve.prompting import Prompter, Read, Reply, Sampling, Task, TooLong, Unfolded
from speechgpt.language.config import GenerationSection
from speechgpt.runtime.config import ServingSection


class LanguageModel:
    """Also the one that refuses to serve an encoder, model and vocoder which do not speak the same units."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, source: Source, serving: ServingSection, encoder: DeploymentHandle, vocoder: DeploymentHandle
    ) -> None:
        self._prompter = Prompter.load(open_bundle(source).directory, serving)
        heard, spoken, known = await encoder.clusters.remote(), await vocoder.units.remote(), self._prompter.unit_count
        if not heard == known == spoken:
            raise RuntimeError(f"unit vocabularies differ: encoder {heard}, language model {known}, vocoder {spoken}")
        await self._prompter.reply(Read("hello", Sampling(GenerationSection(temperature=0, max_new_tokens=4))))

    async def reply(self, task: Task) -> Reply | TooLong:
        return await self._prompter.reply(task)

    async def unfold(self, task: Task, first: int = FEWEST) -> AsyncGenerator[Unfolded, None]:
        """The reply as it is generated; a caller who goes away stops it. first: see `Prompter.unfold`."""
        async with aclosing(self._prompter.unfold(task, first)) as pieces:
            async for piece in pieces:
                yield piece

    def ongoing(self) -> int:
        """Replies that this replica generates, or will."""
        return self._prompter.ongoing

    def check_health(self) -> None:
        self._prompter.check()
