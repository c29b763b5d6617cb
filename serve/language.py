"""The language model deployment, and the ingress of a bundle's application: a task in, a reply out."""

from ray.serve.handle import DeploymentHandle

from serve.batching import batched
from serve.bundles import Source, open_bundle
from serve.prompting import Prompt, Prompter, Read, Reply, Sampling, Task, TooLong
from serve.worker import Worker
from speechgpt.language.config import GenerationSection
from speechgpt.runtime.config import ServingSection


class LanguageModel:
    """Also the one that refuses to serve an encoder, model and vocoder which do not speak the same units."""

    # Serve awaits a constructor that is a coroutine.
    async def __init__(  # type: ignore[misc]
        self, source: Source, serving: ServingSection, encoder: DeploymentHandle, vocoder: DeploymentHandle
    ) -> None:
        self._worker = Worker(serving.request_timeout_seconds)
        self._prompter = Prompter.load(open_bundle(source).directory)
        self._replies = batched(self._generate, serving.language)
        heard, spoken, known = await encoder.clusters.remote(), await vocoder.units.remote(), self._prompter.unit_count
        if not heard == known == spoken:
            raise RuntimeError(f"unit vocabularies differ: encoder {heard}, language model {known}, vocoder {spoken}")
        warm = self._prompter.prompt(Read("hello", Sampling(GenerationSection(temperature=0, max_new_tokens=4))))
        if isinstance(warm, Prompt):
            await self._worker.run(lambda: self._prompter.generate([warm]))

    async def reply(self, task: Task) -> Reply | TooLong:
        prompt = self._prompter.prompt(task)
        return prompt if isinstance(prompt, TooLong) else await self._replies(prompt)

    async def _generate(self, prompts: list[Prompt]) -> list[Reply]:
        return await self._worker.run(lambda: self._prompter.generate(prompts))

    def check_health(self) -> None:
        self._worker.check()
