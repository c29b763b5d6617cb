"""A language model that is asked and answers in text and units."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from speechgpt.language import answers
from speechgpt.language.answers import Answer
from speechgpt.language.config import GenerationSection, ReplyForm
from speechgpt.language.generation import (
    GrammarProcessor,
    SpeltEnd,
    cut_token,
    ending,
    grammar,
    sampling,
)
from speechgpt.language.prompts import Dialogue, Kind, PromptFormat, answer_template, kind_of, with_transcript
from speechgpt.language.segments import Segment
from speechgpt.language.vocabulary import Vocabulary
from speechgpt.language.wording import Wording, context_of
from speechgpt.speech.packed_products import Precision, multiplies_bfloat16

BATCH_ROWS = 32


class SpeechLanguageModel:
    """Recognition, speaking and conversation over one causal language model. Replies do not depend on their batch."""

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary, prompts: PromptFormat) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.prompts = prompts

    @classmethod
    def load(
        cls,
        directory: str | Path,
        adapter: str | Path | None = None,
        device: str | torch.device | None = None,
        precision: Precision = "float32",
    ) -> "SpeechLanguageModel":
        """Read a model in Hugging Face layout with its tokenizer and, stacked on it, a PEFT adapter.

        precision: on CPUs, whatever it was saved in. In float32 a greedy choice is the model's, where bfloat16, half
        the memory and up to twice as fast on processors that have instructions for it, leaves it to what else is in
        the batch.

        Models without `prompt_format.json` are taken for the published weights, if their vocabulary is theirs. Raises
        FileNotFoundError when one of our own lacks it, ValueError when the embedding is smaller than the vocabulary,
        or for a precision that the processor does not have.
        """
        wording = Wording.load(directory)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype: Any = getattr(torch, precision) if device.type == "cpu" else "auto"
        if dtype == torch.bfloat16 and not multiplies_bfloat16():
            raise ValueError(f"precision {precision}: this processor has no instructions for it; leave it at float32")
        model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype)
        if (rows := model.get_output_embeddings().weight.shape[0]) < wording.vocabulary.size:
            raise ValueError(
                f"{directory}: the model has {rows} embeddings for a vocabulary of {wording.vocabulary.size}; "
                "it was saved before its vocabulary grew"
            )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
        return cls(model.to(device), wording.vocabulary, wording.prompts)

    def answer(
        self, dialogues: Sequence[Dialogue], form: ReplyForm, generation: GenerationSection, seed: int = 0
    ) -> list[Answer]:
        """Reply to the last turn of each dialogue. Spoken turns of the past that have no transcript get one first."""
        dialogues = self._transcribed(dialogues, generation)
        replies: dict[int, Answer] = {}
        kinds = [kind_of(dialogue[-1], form) for dialogue in dialogues]
        for kind in sorted(set(kinds)):
            places = [place for place, other in enumerate(kinds) if other == kind]
            asked = [self.prompts.dialogue(dialogues[place], form) for place in places]
            replies |= zip(places, self.reply(asked, kind, generation, seed), strict=True)
        return [replies[place] for place in range(len(dialogues))]

    def transcribe(self, units: Sequence[Sequence[int]], generation: GenerationSection, seed: int = 0) -> list[str]:
        """The words of each stretch of speech; an empty string when nothing came of it."""
        asked = [self.prompts.transcription(stretch) for stretch in units]
        return [answer.text or "" for answer in self.reply(asked, "transcribe", generation, seed)]

    def speak(self, texts: Sequence[str], generation: GenerationSection, seed: int = 0) -> list[list[int]]:
        """Each text as units."""
        asked = [self.prompts.speaking(text) for text in texts]
        return [answer.units or [] for answer in self.reply(asked, "speak", generation, seed)]

    def reply(
        self, prompts: Sequence[Sequence[Segment]], kind: Kind, generation: GenerationSection, seed: int = 0
    ) -> list[Answer]:
        """Go on from prompts of one kind. Raises ValueError for a prompt that fills the model's context."""
        return self.continued([self.vocabulary.encode_prompt(prompt) for prompt in prompts], kind, generation, seed)

    def continued(
        self, encoded: Sequence[list[int]], kind: Kind, generation: GenerationSection, seed: int = 0
    ) -> list[Answer]:
        """As `reply`, from prompts that are token ids."""
        generated = self._generated(encoded, kind, generation, seed)
        return [answers.parse(ids, self.vocabulary, kind) for ids in generated]

    def unguided(
        self, prompts: Sequence[Sequence[Segment]], generation: GenerationSection, seed: int = 0
    ) -> list[list[int]]:
        """Token ids that the model goes on with, up to and with the first end, where no grammar has a say in them.

        Raises ValueError for a prompt that fills the model's context.
        """
        return self._generated([self.vocabulary.encode_prompt(prompt) for prompt in prompts], None, generation, seed)

    def _generated(
        self, encoded: Sequence[list[int]], kind: Kind | None, generation: GenerationSection, seed: int
    ) -> list[list[int]]:
        """In batches of like length. kind: whose grammar holds; None: none does."""
        for place, ids in enumerate(encoded):
            if len(ids) >= self.context:
                raise ValueError(f"prompt {place} has {len(ids)} tokens, the model's context {self.context}")
        by_length = sorted(range(len(encoded)), key=lambda place: (len(encoded[place]), place))
        generated: dict[int, list[int]] = {}
        for start in range(0, len(by_length), BATCH_ROWS):
            places = by_length[start : start + BATCH_ROWS]
            batch = self._generate([encoded[place] for place in places], kind, generation, seed)
            generated |= zip(places, batch, strict=True)
        return [generated[place] for place in range(len(encoded))]

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[list[int]], kind: Kind | None, generation: GenerationSection, seed: int
    ) -> list[list[int]]:
        vocabulary, device = self.vocabulary, self.model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[vocabulary.pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        budgets = [min(generation.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        rules = LogitsProcessorList()
        end = ending(vocabulary)
        if kind is not None:
            regions = grammar(answer_template(self.prompts.dialect, kind), vocabulary)
            end = regions.ending
            rules.append(
                GrammarProcessor(
                    regions,
                    vocabulary,
                    rows=self.model.get_output_embeddings().weight.shape[0],
                    prompt_length=longest,
                    budgets=budgets,
                    max_text_tokens=generation.max_text_tokens,
                )
            )
        seeds = [seed_of(prompt, seed) for prompt in prompts]
        stops = [SpeltEnd(vocabulary, end.spelt, longest)] if end.spelt else []
        ends = [*end.tokens, cut_token(vocabulary)]
        settings = GenerationConfig(
            do_sample=False,
            # The grammar keeps each reply within its own budget; without one, all have the least.
            max_new_tokens=max(budgets) if rules else min(budgets),
            eos_token_id=ends,
            pad_token_id=vocabulary.pad,
            bos_token_id=vocabulary.bos,
        )
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([*rules, *sampling(generation, seeds, device)]),
            stopping_criteria=StoppingCriteriaList(stops),
        )
        return [_until(row, {*ends}) for row in generated[:, longest:].tolist()]

    def _transcribed(self, dialogues: Sequence[Dialogue], generation: GenerationSection) -> list[Dialogue]:
        unheard = [
            (number, place)
            for number, dialogue in enumerate(dialogues)
            for place, turn in enumerate(dialogue[:-1])
            if turn.units is not None and not turn.text
        ]
        if not unheard:
            return list(dialogues)
        words = self.transcribe([dialogues[number][place].units or () for number, place in unheard], generation)
        heard = [list(dialogue) for dialogue in dialogues]
        for (number, place), transcript in zip(unheard, words, strict=True):
            heard[number][place] = with_transcript(heard[number][place], transcript)
        return list(heard)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        return context_of(self.model.config)

    @property
    def wording(self) -> Wording:
        return Wording(self.vocabulary, self.prompts, self.context)


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Generated tokens up to and with the first end; what follows pads the batch."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def seed_of(prompt: list[int], seed: int) -> int:
    """A seed for one reply, from the prompt itself: the same request gives the same reply in any company."""
    digest = hashlib.blake2b(repr((seed, prompt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
