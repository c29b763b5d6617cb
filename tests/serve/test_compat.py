"""`speechgpt chat --compat` over a bundle: the original's inputs and files, without its faults."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from serve.chat import ChatError, main
from serve.compat import Console, Response, answer_all, converse, keep
from serve.pipeline import OwnPipeline
from serve.prompting import Prompt, Prompter, Reply, Sampling, Typed
from speechgpt.language.config import GenerationSection
from speechgpt.language.console import Record
from speechgpt.recipe import Recipe, load
from speechgpt.speech.audio import decode, encode
from speechgpt.speech.units import parse_units


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    time = np.arange(16_000) / 16_000
    file = tmp_path / "my question.wav"
    tone = np.sin(2 * np.pi * 2 * time) ** 2 * np.sin(2 * np.pi * (200 + 150 * time) * time)
    file.write_bytes(encode((0.4 * tone).astype(np.float32), "wav"))
    return file


@pytest.fixture(scope="module")
def console(tiny_bundle: Path, tiny: Recipe) -> Iterator[Console]:
    with asyncio.Runner() as runner:
        yield Console(OwnPipeline(tiny_bundle, tiny.serving), Sampling(tiny.generation), runner)


def records(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "responses.json").read_text().splitlines()]


def test_the_four_kinds_of_line(
    console: Console, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = iter(
        [
            str(recording),
            f"Recognize this speech, this is input: {recording} ",
            "Read this sentence aloud, this is input: two plus three is five",
            "what is two plus three",
            "quit",
        ]
    )
    invitations = []
    monkeypatch.setattr("builtins.input", lambda prompt: invitations.append(prompt) or next(lines))
    converse(console, tmp_path / "out")
    assert invitations[:2] == ["Please talk with SpeechGPT:\n", "Please input prompts for SpeechGPT:\n"]
    printed = capsys.readouterr().out
    assert "Transcript: " in printed and "Text response: " in printed and "Response:\n" in printed
    spoken, dictated, read, written = records(tmp_path / "out")
    assert spoken["textAnswer"] and spoken["question"].startswith("<sosp> <")
    assert spoken["answer"].endswith(f"[ua] {spoken['unitAnswer']}")
    assert dictated["answer"] and not dictated["unitAnswer"] and str(recording) not in dictated["question"]
    assert parse_units(read["answer"]) and not read["unitAnswer"]
    assert written["question"] == "what is two plus three" and written["answer"]
    sounds = {file.name for file in (tmp_path / "out" / "wav").iterdir()}
    assert sounds == {"answer_0.wav", "answer_2.wav"}
    assert len(decode(tmp_path / "out" / "wav" / "answer_2.wav")) > 0


def test_numbers_count_the_lines_of_earlier_runs(tmp_path: Path) -> None:
    """As the original counts them; a line break inside an answer is none of the file's."""
    record = Record(question="a\nb", answer="c", textQuestion="", textAnswer="", unitAnswer="")
    files = [keep(tmp_path, Response(record, wav, True)) for wav in (None, b"RIFF", b"RIFF")]
    assert files == [None, tmp_path / "wav" / "answer_1.wav", tmp_path / "wav" / "answer_2.wav"]
    assert records(tmp_path) == [record] * 3


def test_a_file_of_lines(console: Console, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = tmp_path / "silent.wav"
    silent.write_bytes(encode(np.zeros(16_000, np.float32), "wav"))
    questions = {
        1: "what is two plus three",
        3: "gone.wav",
        4: str(silent),
        5: str(recording),
        6: "Read, this is input:",
    }
    with pytest.raises(typer.Exit) as ended:
        answer_all(console, questions, tmp_path / "out", as_json=True)
    assert ended.value.exit_code == 1
    told = json.loads(capsys.readouterr().out)
    assert [answer["line"] for answer in told["answers"]] == [1, 5]
    assert [failure["line"] for failure in told["failures"]] == [3, 4, 6]
    assert "no such file" in told["failures"][0]["error"] and "silent" in told["failures"][1]["error"]
    assert len(records(tmp_path / "out")) == 2
    assert told["answers"][1]["audio"] == str(tmp_path / "out" / "wav" / "answer_1.wav")


def test_a_line_that_fills_the_context(console: Console) -> None:
    with pytest.raises(ChatError, match="leave no room"):
        console.answer("why " * 600)


def test_the_published_vocabulary_is_asked_with_the_published_prompt(tmp_path: Path) -> None:
    """Tags in pieces are how published weights are told from ours; such a model goes the whole way, too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from speechgpt.language.console import published_prompt
    from speechgpt.language.model import SpeechLanguageModel
    from speechgpt.language.prompts import META, PromptFormat
    from speechgpt.language.scratch import train_tokenizer
    from speechgpt.language.vocabulary import Vocabulary

    torch.manual_seed(0)
    vocabulary = Vocabulary.grow(train_tokenizer([META, "what is it; [ta] it is; [ua] <eoa>"], 300), 10, "released")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocabulary.size, max_position_embeddings=1024))
    prompter = Prompter.of(SpeechLanguageModel(model, vocabulary, PromptFormat()), load("tiny").serving)
    sampling = Sampling(GenerationSection(max_new_tokens=20), seed=0)
    parts = ("Recognize this speech, this ", (3, 1, 4))
    prompt = prompter.prompt(Typed(parts, sampling))
    assert isinstance(prompt, Prompt)
    expected = vocabulary.encode_prompt(published_prompt(META, parts))
    assert (list(prompt.ids), prompt.kind) == (expected, "transcribe")
    reply = asyncio.run(prompter.reply(Typed(parts, sampling)))
    assert isinstance(reply, Reply) and reply.text and not reply.units


@pytest.mark.parametrize(
    "words",
    [
        ("--compat", "--url", "http://127.0.0.1:1"),
        ("--input", "questions.txt"),
        ("--compat", "--input", "questions.txt", "--ask", "hello"),
    ],
)
def test_wrong_usage(words: tuple[str, ...]) -> None:
    app = typer.Typer()
    app.command()(main)
    assert CliRunner().invoke(app, list(words)).exit_code == 2


@pytest.mark.slow
def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    """With the tiny bundle, in this process: one line as JSON, then a file that is not there."""
    app = typer.Typer()
    app.command()(main)
    words = [str(tiny_bundle), "--recipe", "tiny", "--compat", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--ask", "Read, this is input: two", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["question"] == "Read, this is input: two" and Path(answer["audio"]).is_file()
    missing = CliRunner().invoke(app, [*words, "--input", str(tmp_path / "none.txt")])
    assert missing.exit_code == 1 and "none.txt" in missing.stderr
