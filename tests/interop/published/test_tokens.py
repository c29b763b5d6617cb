"""Ids of text, units and markers are those that transformers 4.33's slow LLaMA tokenizer gives."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speechgpt.interop.llama import convert_language
from speechgpt.language import sentencepiece_bpe
from speechgpt.language.prompts import META, PromptFormat, Turn
from speechgpt.language.vocabulary import Vocabulary

ROWS = json.loads((Path(__file__).parents[2] / "language" / "published_rows.json").read_text())["fixtures"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pieces: Path, transformers_4_33: Callable[..., str]) -> Path:
    """Where 4.33.1 saved its own grown tokenizers: this path with `-ma` and `-cm` behind it."""
    directory = tmp_path_factory.mktemp("saved") / "tokenizer"
    transformers_4_33("save", str(pieces), str(directory))
    return directory


@pytest.fixture(scope="module")
def reference(saved: Path, transformers_4_33: Callable[..., str]) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: json.loads(transformers_4_33("encode", f"{saved}-cm", given=json.dumps(texts)))


@pytest.fixture(scope="module")
def vocabulary(published, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """As it is read back after conversion, the way that a bundle's model reads it."""
    target = tmp_path_factory.mktemp("converted") / "cm"
    convert_language(published.cm, target)
    return Vocabulary.load(target)


@pytest.mark.parametrize("name", ["ma", "cm"])
def test_the_published_files_are_written_here_as_4_33_writes_them(name: str, saved: Path, published) -> None:
    theirs, ours = Path(f"{saved}-{name}"), getattr(published, name)
    added = json.loads((theirs / "added_tokens.json").read_text())
    assert added == json.loads((ours / "added_tokens.json").read_text())
    assert (theirs / "tokenizer.model").read_bytes() == (ours / "tokenizer.model").read_bytes()
    settings = json.loads((ours / "tokenizer_config.json").read_text())
    assert settings.items() <= json.loads((theirs / "tokenizer_config.json").read_text()).items()
    # Sizes on the hub: 17.9 kB, 18.0 kB, 435 B (SPEC 2.7).
    assert (theirs / "added_tokens.json").stat().st_size == {"ma": 17931, "cm": 18011}[name]
    assert (theirs / "special_tokens_map.json").stat().st_size == 435


def test_units_and_markers_have_the_published_numbers(vocabulary: Vocabulary) -> None:
    assert vocabulary.unit_ids([0, 999]) == [32000, 32999]
    assert vocabulary.marker_ids == {
        "<sosp>": 33000,
        "<eosp>": 33001,
        "[Human]": 33002,
        "[SpeechGPT]": 33003,
        "<eoh>": 33004,
        "<eos>": 33005,
    }
    assert (vocabulary.size, vocabulary.markers) == (33006, "released")
    assert (vocabulary.pad, vocabulary.bos, vocabulary.eos) == (0, 1, 2)


def test_published_rows_and_lines(vocabulary: Vocabulary, reference: Callable) -> None:
    rows = [row for row in ROWS if "plain_text" in row]
    for row, ids in zip(rows, reference([row["prefix"] + row["plain_text"] for row in rows]), strict=True):
        encoded = vocabulary.encode_row(row["prefix"], row["plain_text"])
        assert encoded.ids == [*ids, vocabulary.eos]
        assert encoded.ids[encoded.masked] == vocabulary.human
    lines = [row["text"] for row in ROWS if "text" in row]
    assert [[1, *vocabulary.encode(line)] for line in lines] == reference(lines)


def test_prompts_are_the_published_one_without_its_last_space(vocabulary: Vocabulary, reference: Callable) -> None:
    """The authors' console ends its prompt with a space, a token `▁` that no training row has there: in a row the
    space belongs to the answer's first word."""
    units = "<sosp><661><987><520><eosp>"
    questions = ["Who is Lebron James?", units, f"Recognize this speech, this is input: {units}"]
    theirs = reference([f"{META}[Human]: {question} <eoh>. [SpeechGPT]: " for question in questions])
    prompts = PromptFormat()
    ours = [
        vocabulary.encode_prompt(prompts.dialogue([Turn("user", text=questions[0])], "text")),
        vocabulary.encode_prompt(prompts.dialogue([Turn("user", units=[661, 987, 520])], "chain")),
    ]
    space = vocabulary.tokenizer.convert_tokens_to_ids("▁")
    assert [ids[-1] for ids in theirs] == [space] * 3
    assert ours == [ids[:-1] for ids in theirs[:2]]
    assert vocabulary.encode(f"{META}[Human]: {questions[2]} <eoh>. [SpeechGPT]: ") == theirs[2][1:]


def test_mixtures_of_text_units_and_markers(
    vocabulary: Vocabulary, reference: Callable, texts: list[str], mixtures: Callable
) -> None:
    mixed = mixtures(texts, 3000, seed=0)
    differing = [
        text for text, ids in zip(mixed, reference(mixed), strict=True) if [1, *vocabulary.encode(text)] != ids
    ]
    assert differing == []


def test_the_exported_tokenizer_alone_reads_rows_alike(vocabulary: Vocabulary, reference: Callable) -> None:
    rows = [row["prefix"] + row["plain_text"] for row in ROWS if "plain_text" in row]
    assert vocabulary.tokenizer(rows).input_ids == reference(rows)


def test_text_comes_back(vocabulary: Vocabulary) -> None:
    for text in ("Today is a sunny day.", "日本語 🙂", "two  spaces"):
        assert vocabulary.decode(vocabulary.encode_plain(text)) == text


@pytest.mark.parametrize("settings", [{"add_dummy_prefix": False}, {"normalization_rule_name": "nfkc"}])
def test_another_kind_of_sentencepiece_is_refused(settings: dict, tmp_path: Path, texts: list[str]) -> None:
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(texts[:3000]))
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **settings}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **rules,
    )
    with pytest.raises(sentencepiece_bpe.SentencePieceError, match="not a model of LLaMA's kind"):
        sentencepiece_bpe.read(tmp_path)


def test_a_damaged_model_is_refused(tmp_path: Path, pieces: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes()[:-1000])
    with pytest.raises(sentencepiece_bpe.SentencePieceError, match="damaged"):
        sentencepiece_bpe.read(tmp_path)
