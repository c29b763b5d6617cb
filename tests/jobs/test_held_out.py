import pyarrow as pa
import pytest
import torch

from jobs import held_out
from speechgpt import recipe as recipes
from speechgpt.training import starting
from speechgpt.training.config import StageSection

UNITS = "<sosp><1><2><3><eosp>"


def stage(**changes) -> StageSection:
    settings = {"mixture": {"transcribe": 1}, "steps": 1, "learning_rate": 1, "block": 64, "validate_every": 1}
    return StageSection(**{**settings, **changes})


def rows(**splits: str) -> pa.Table:
    """A hundred rows of two kinds; `splits` gives a split other than train to a kind's first five."""
    made = []
    for kind, answer in (("text", "yes<eoa>."), ("transcribe", "a dog<eos>.")):
        for number in range(100):
            asked = (
                f"[Human]: is it {number}<eoh>. " if kind == "text" else f"[Human]:Say. This is input: {UNITS}<eoh>."
            )
            split = splits.get(kind, "train") if number < 5 else "train"
            plain = f"{asked}[SpeechGPT]: {answer}"
            made.append(dict(id=f"{kind}-{number}", kind=kind, prefix="", plain_text=plain, category="", split=split))
    return pa.Table.from_pylist(made)


def kinds(table: pa.Table) -> dict[str, int]:
    return {kind: table["kind"].to_pylist().count(kind) for kind in ("text", "transcribe")}


def test_a_twentieth_is_held_out_the_same_in_every_stage():
    learnt, held = held_out.divided(rows(), stage())
    assert (kinds(held), kinds(learnt)) == ({"text": 5, "transcribe": 5}, {"text": 95, "transcribe": 95})
    _, other = held_out.divided(rows(), stage(mixture={"text": 1}, steps=7))
    assert held.equals(other)
    _, fewer = held_out.divided(rows(), stage(validation_rows=2))
    assert kinds(fewer) == {"text": 2, "transcribe": 2}


def test_the_manifest_s_own_split_goes_first():
    _, held = held_out.divided(rows(text="heldout"), stage())
    assert kinds(held) == {"text": 5, "transcribe": 5}
    assert {name for name in held["id"].to_pylist() if name.startswith("text")} == {f"text-{n}" for n in range(5)}


def test_without_validation_only_the_split_is_kept_from_training():
    learnt, held = held_out.divided(rows(text="heldout"), stage(validate_every=0))
    assert kinds(held) == {"text": 5, "transcribe": 0}
    assert kinds(learnt) == {"text": 95, "transcribe": 100}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("base")
    language = recipes.load("tiny").language
    starting.write_base(folder, language, None, rows()["plain_text"].to_pylist(), torch.randn(8, 4), 1)
    return folder


def test_a_stage_is_validated_on_its_own_kinds_and_asked_their_questions(base):
    _, held = held_out.divided(rows(), stage())
    found = held_out.prepared(held, stage(answers=3), base)
    assert found is not None and set(found.sets) == {"", held_out.RETAINED}
    vocabulary, _ = starting.interface(base)
    tokens = sum(found.sets[""]["tokens"].to_pylist())
    assert tokens == sum(
        len(vocabulary.encode_row("", row["plain_text"]).ids) for row in held.to_pylist() if row["kind"] == "transcribe"
    )
    assert [question.kind for question in found.questions] == ["transcribe"] * 3
    # Asked as the model was taught, up to where the answer begins.
    for question in found.questions:
        taught = vocabulary.encode_row("", question.shown).ids
        assert list(taught[: len(question.ids)]) == question.ids


def test_a_stage_none_of_whose_rows_are_held_out_is_not_validated(base):
    _, held = held_out.divided(rows(), stage())
    assert held_out.prepared(held, stage(mixture={"units": 1}), base) is None
