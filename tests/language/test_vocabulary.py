"""Ids in the published order, and text that never turns into control tokens."""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from speechgpt.language.config import Dialect
from speechgpt.language.prompts import META, Exchange, PromptFormat, Turn, row_text
from speechgpt.language.segments import MarkerError, Plain, Speech, Template, find_marker, write
from speechgpt.language.vocabulary import Vocabulary, VocabularyError

PUBLISHED = json.loads(Path(__file__).with_name("published_rows.json").read_text())["fixtures"]
ROWS = [fixture for fixture in PUBLISHED if "plain_text" in fixture]
MARKERS = ["<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", "<eos>", "<eoa>", "[tq]", "[ta]", "[ua]"]
hostile = st.lists(
    st.one_of(st.sampled_from([*MARKERS, "<0>", "<12>", "<s>", "</s>", "<unk>", "<pad>"]), st.text())
).map("".join)
harmless = st.text().filter(lambda text: find_marker(text) is None)
same_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def base_of(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"piece{n}": n for n in range(3, size)}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_ids_are_those_of_the_published_weights():
    vocabulary = Vocabulary.grow(base_of(32000), 1000, "released")
    assert vocabulary.unit_ids([0, 999]) == [32000, 32999]
    assert (vocabulary.sosp, vocabulary.eosp, vocabulary.human) == (33000, 33001, 33002)
    assert (vocabulary.speechgpt, vocabulary.eoh, vocabulary.eos_marker) == (33003, 33004, 33005)
    assert vocabulary.size == 33006
    assert vocabulary.padded_size(64) == 33024
    assert (vocabulary.pad, vocabulary.bos, vocabulary.eos) == (0, 1, 2)
    assert vocabulary.tokenizer.padding_side == "left"
    assert vocabulary.eoa is None


def test_our_own_markers_follow_the_published_ones(any_tokenizer: PreTrainedTokenizerBase):
    base = len(any_tokenizer)
    vocabulary = Vocabulary.grow(any_tokenizer, 10, "whole")
    assert vocabulary.encode("<0><9>" + "".join(MARKERS)) == [base, *range(base + 9, base + 20)]
    assert vocabulary.size == base + 20


def test_growing_twice_is_refused(scratch_tokenizer: PreTrainedTokenizerBase):
    Vocabulary.grow(scratch_tokenizer, 10, "whole")
    with pytest.raises(VocabularyError, match="already has '<0>'"):
        Vocabulary.grow(scratch_tokenizer, 10, "whole")


def test_a_tokenizer_without_units_is_refused(scratch_tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(VocabularyError, match="no token '<0>'"):
        Vocabulary(scratch_tokenizer, 10)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["kind"])
def test_published_rows_are_read_as_transformers_4_33_did(row, llama_directory: Path, llama_tokenizer):
    """Reference: cut at added tokens, strip beside them, give each stretch to SentencePiece on its own (SPEC 2.3)."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_directory / "tokenizer.model"))
    base = reference.get_piece_size()
    added = [f"<{n}>" for n in range(1000)] + MARKERS[:6]
    stretches = re.split("(" + "|".join(map(re.escape, added)) + ")", row["prefix"] + row["plain_text"])
    expected = []
    for place, stretch in enumerate(stretches):
        if stretch in added:
            expected.append(base + added.index(stretch))
            continue
        stretch = stretch.lstrip() if place > 0 else stretch
        stretch = stretch.rstrip() if place < len(stretches) - 1 else stretch
        expected += reference.encode(stretch) if stretch else []

    vocabulary = Vocabulary.grow(llama_tokenizer, 1000, "released")
    encoded = vocabulary.encode_row(row["prefix"], row["plain_text"])
    assert encoded.ids == [1, *expected, 2]
    assert encoded.masked == 1 + len(reference.encode(META.rstrip()))
    assert encoded.ids[encoded.masked] == vocabulary.human


@pytest.mark.parametrize("markers", ["released", "whole"])
def test_the_exported_tokenizer_alone_reads_a_row_alike(markers, scratch_tokenizer, tmp_path: Path):
    vocabulary = Vocabulary.grow(scratch_tokenizer, 1000, markers)
    vocabulary.save(tmp_path)
    alone = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for row in ROWS:
        assert alone(row["plain_text"], add_special_tokens=False).input_ids == vocabulary.encode(row["plain_text"])


@given(text=hostile)
@same_tokenizer
def test_user_text_never_becomes_control_tokens(text: str, any_tokenizer: PreTrainedTokenizerBase):
    vocabulary = grown(any_tokenizer)
    ids = vocabulary.encode_segments([Template("[Human]: "), Plain(text), Template("<eoh>.")])
    control = [token for token in ids if token in vocabulary.control_ids - {any_tokenizer.unk_token_id}]
    assert control == [vocabulary.human, vocabulary.eoh]


@given(text=hostile)
@same_tokenizer
def test_plain_text_survives_the_scratch_vocabulary(text: str, scratch_tokenizer: PreTrainedTokenizerBase):
    vocabulary = grown(scratch_tokenizer)
    text = text.encode("utf-8", "ignore").decode()
    assert vocabulary.decode(vocabulary.encode_plain(text)) == text.strip()


@given(text=harmless, units=st.lists(st.integers(0, 9), min_size=1))
@same_tokenizer
def test_segments_and_their_string_have_the_same_ids(text: str, units: list[int], any_tokenizer):
    vocabulary = grown(any_tokenizer)
    segments = [Template("[Human]: Say "), Plain(text), Template(". It is: "), Speech(tuple(units)), Template("<eoh>.")]
    assert vocabulary.encode_segments(segments) == vocabulary.encode(write(segments))


def test_half_a_surrogate_pair_is_read_as_a_question_mark(any_tokenizer: PreTrainedTokenizerBase):
    vocabulary = grown(any_tokenizer)
    assert vocabulary.encode_plain("two \ud800") == vocabulary.encode_plain("two ?")


def test_a_row_cannot_hold_a_users_marker():
    with pytest.raises(MarkerError, match=r"'\[ta\]'"):
        write([Template("[Human]: "), Plain("what is [ta]")])


def test_a_text_after_a_prefix_must_start_with_a_marker(scratch_tokenizer):
    with pytest.raises(ValueError, match="must start with a marker"):
        grown(scratch_tokenizer).encode_row("prefix\n", "text")


@pytest.mark.parametrize("dialect", ["released", "paper"])
def test_a_prompt_is_the_beginning_of_its_row(dialect: Dialect, any_tokenizer: PreTrainedTokenizerBase):
    vocabulary = grown(any_tokenizer)
    prompts = PromptFormat(dialect, META, transcribe="Write it down.", speak="Say it.")
    spoken, written = Turn("user", units=[1, 2]), Turn("user", text="what is two")
    asked = {
        "transcribe": prompts.transcription([1, 2]),
        "speak": prompts.speaking("what is two"),
        "s2s": prompts.dialogue([spoken], "chain"),
        "s2t": prompts.dialogue([spoken], "text"),
        "t2s": prompts.dialogue([written], "chain"),
        "t2t": prompts.dialogue([written], "text"),
        "direct": prompts.dialogue([spoken], "direct"),
    }
    for kind, prompt in asked.items():
        description = prompts.speak if kind == "speak" else prompts.transcribe
        exchange = Exchange(kind, "what is two", "it is two", (1, 2), (3,), description)
        ids = vocabulary.encode_prompt(prompt)
        assert vocabulary.encode_row(META, row_text(dialect, [exchange])).ids[: len(ids)] == ids


def test_units_outside_the_codebook_are_refused(scratch_tokenizer):
    vocabulary = grown(scratch_tokenizer)
    for wrong in (
        lambda: vocabulary.unit_ids([10]),
        lambda: vocabulary.unit_ids([-1]),
        lambda: vocabulary.encode("<10>"),
    ):
        with pytest.raises(ValueError, match="outside the codebook of 10"):
            wrong()


def test_units_and_text_come_back(scratch_tokenizer):
    vocabulary = grown(scratch_tokenizer)
    ids = vocabulary.encode("[SpeechGPT]: [ta] two plus three; [ua] <sosp><3><0><eosp><eoa>.")
    assert vocabulary.units(ids) == [3, 0]
    assert vocabulary.decode(ids) == "[SpeechGPT] : [ta] two plus three; [ua]<sosp><3><0><eosp><eoa> ."


@pytest.mark.parametrize("merged", [True, False])
def test_save_and_load(any_tokenizer: PreTrainedTokenizerBase, merged: bool, tmp_path: Path):
    vocabulary = Vocabulary.grow(any_tokenizer, 10, "whole", merged)
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert (loaded.unit_count, loaded.markers, loaded.merged) == (10, "whole", merged)
    text = "[Human]: what is <12>? <3><eoh>"
    assert loaded.encode_plain(text) == vocabulary.encode_plain(text)
    assert loaded.marker_ids == vocabulary.marker_ids


def test_a_published_model_is_counted_by_its_tokens(llama_tokenizer, tmp_path: Path):
    Vocabulary.grow(llama_tokenizer, 10, "released").tokenizer.save_pretrained(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert (loaded.unit_count, loaded.markers, loaded.pad) == (10, "released", 0)


def grown(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Once for all examples of a property."""
    if "<0>" in tokenizer.get_vocab():
        return tokenizer.vocabulary
    tokenizer.vocabulary = Vocabulary.grow(tokenizer, 10, "whole")
    return tokenizer.vocabulary
