"""The grammar of replies inside vLLM: what each reply of a batch may go on with, as a mask over the logits.

Runs in vLLM's own process, which finds everything in the model's directory and in each request's `extra_args`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from serve.vllm_orphans import end_with_owner
from speechgpt.language.generation import Grammar, Walk, allowed_tokens, cut_token, grammar
from speechgpt.language.prompts import Kind, answer_template
from speechgpt.language.wording import Wording

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

# The first of ours that every process of vLLM imports, with its configuration.
end_with_owner()


def arguments(kind: Kind, max_text_tokens: int) -> dict[str, Any]:
    """`extra_args` of a request."""
    return {"kind": kind, "max_text_tokens": max_text_tokens}


@dataclass
class _Reply:
    """first: the row of the mask that belongs to its kind's first state. tokens: vLLM's own list, which grows."""

    walk: Walk
    first: int
    tokens: list[int]
    taken: int = 0


class ReplyGrammar(LogitsProcessor):
    """Masks every token that a reply's grammar does not allow next."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        wording = Wording.load(vllm_config.model_config.model)
        self._vocabulary = wording.vocabulary
        rows = vllm_config.model_config.get_vocab_size()
        self._grammars: dict[str, tuple[Grammar, int]] = {}
        masks = [torch.ones(1, rows, dtype=torch.bool), torch.zeros(1, rows, dtype=torch.bool)]
        masks[1][0, cut_token(wording.vocabulary)] = True
        for kind in get_args(Kind):
            rules = grammar(answer_template(wording.prompts.dialect, kind), wording.vocabulary)
            self._grammars[kind] = rules, sum(map(len, masks))
            masks.append(allowed_tokens(rules, wording.vocabulary, rows))
        # Rows: all, the cut token alone, and each kind's states.
        self._forbidden = ~torch.cat(masks).to(device)
        self._replies: dict[int, _Reply] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._replies, batch_update, self._new)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [replies, vocabulary], changed in place."""
        states = [0] * len(logits)
        places, repeated = [], []
        for place, reply in self._replies.items():
            if place >= len(logits):
                continue
            for token in reply.tokens[reply.taken :]:
                reply.walk.take(token)
            reply.taken = len(reply.tokens)
            if reply.walk.spent:
                states[place] = 1
                continue
            states[place] = reply.first + reply.walk.state
            if (unit := reply.walk.repeated) is not None:
                places.append(place)
                repeated.append(unit)
        logits.masked_fill_(self._forbidden[torch.tensor(states, device=logits.device)], -torch.inf)
        if places:
            logits[
                torch.tensor(places, device=logits.device), torch.tensor(repeated, device=logits.device)
            ] = -torch.inf
        return logits

    def _new(self, params: "SamplingParams", prompt: list[int] | None, tokens: list[int]) -> _Reply | None:
        if not params.extra_args:
            # vLLM's own warming up.
            return None
        rules, first = self._grammars[params.extra_args["kind"]]
        return _Reply(Walk(rules, self._vocabulary, params.extra_args["max_text_tokens"]), first, tokens)
