"""What a reply is, whatever was asked for, in both dialects and vocabularies."""

import pytest

from speechgpt.evaluation.metrics import Bootstrap
from speechgpt.evaluation.task_recognition import TASKS, Done, Task, asked, done, figures, right_shapes
from speechgpt.language.prompts import descriptions
from speechgpt.language.scratch import train_tokenizer
from speechgpt.language.vocabulary import Vocabulary

SPEECH = "<sosp><1><2><3><eosp>"


@pytest.fixture(scope="module", params=["whole", "released"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary.grow(train_tokenizer(["what is two plus three"], 320), 10, request.param)


@pytest.mark.parametrize(
    ("reply", "shape"),
    [
        ("two plus three<eoa>", "text"),
        (f"{SPEECH}<eoa>", "speech"),
        ("[ta] five<eoa>", "t2t"),
        (f"[ta] five; [ua] {SPEECH}<eoa>", "t2s"),
        ("two plus three; [ta] five<eoa>", "s2t"),
        ("[tq] two plus three; [ta] five<eoa>", "s2t"),
        (f"two plus three; [ta] five; [ua] {SPEECH}<eoa>", "s2s"),
        (f"two plus three {SPEECH}<eoa>", "mixed"),
        ("<eoa>", "nothing"),
    ],
)
def test_the_shape_of_a_reply(vocabulary, reply, shape):
    ids = [*vocabulary.encode(reply), vocabulary.eos]
    assert done(ids, vocabulary, "s2s") == Done(shape, shape == "s2s")


def test_a_reply_that_never_ends_has_a_shape_and_no_form(vocabulary):
    assert done(vocabulary.encode("two plus three"), vocabulary, "transcribe") == Done("text", False)
    assert done([*vocabulary.encode("two plus three<eoa>")], vocabulary, "transcribe").well_formed


def test_forms_that_are_asked_for_alike_count_alike():
    assert right_shapes("paper", "s2t") == {"s2t"}
    assert right_shapes("released", "s2t") == {"s2s", "s2t"}
    assert right_shapes("released", "t2s") == {"t2s", "t2t"}
    assert right_shapes("released", "transcribe") == {"text"}
    assert right_shapes("released", "speak") == {"speech"}


def test_wordings_are_the_first_or_drawn_by_the_clip():
    fixed = {asked(Task("t", "speak", "fixed"), f"c{n}", "a", (1,), 1).description for n in range(20)}
    drawn = [asked(Task("t", "speak", "drawn"), f"c{n}", "a", (1,), 1).description for n in range(20)]
    assert fixed == {descriptions("speak")[0]}
    assert len(set(drawn)) > 5 and descriptions("speak")[0] not in drawn
    assert drawn == [asked(Task("t", "speak", "drawn"), f"c{n}", "a", (1,), 1).description for n in range(20)]


def test_every_reply_is_counted_once():
    found = {
        "transcribe": [Done("text", True), Done("text", False), Done("s2s", False)],
        "s2t": [Done("s2s", False), Done("nothing", False)],
    }
    measured = figures("released", found, Bootstrap(0))
    assert list(measured["tasks"]) == ["transcribe", "s2t"]
    for name, task in measured["tasks"].items():
        assert sum(task["shapes"].values()) == task["asked"] == len(found[name])
    assert measured["tasks"]["transcribe"]["recognised"]["value"] == pytest.approx(2 / 3)
    assert measured["tasks"]["transcribe"]["well_formed"]["value"] == pytest.approx(1 / 3)
    assert measured["tasks"]["s2t"]["recognised"]["value"] == 0.5
    assert (measured["all"]["value"], measured["all"]["count"]) == (0.6, 5)
    assert len({task.name for task in TASKS}) == len(TASKS)
