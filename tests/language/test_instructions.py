"""What rows are made of, and what is refused."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechgpt.language.config import InstructionsSection
from speechgpt.language.conversations import AskedTurn, Conversation
from speechgpt.language.instructions import Refusal, Row, RowBuilder, Utterance, WrittenQuestion, tally, total
from speechgpt.language.prompts import META, Exchange, PromptFormat, descriptions, read_row
from speechgpt.language.segments import find_marker

QUESTION = Utterance("q1", (1, 2, 3), "what is two", "plus", answer="it is two")
SPOKEN = {"it is two": (7, 8)}


def builder(section: InstructionsSection | None = None, dialect="paper", **more) -> RowBuilder:
    values = {"seed": 1, "spoken_answers": SPOKEN} | more
    return RowBuilder(PromptFormat(dialect, META), section or InstructionsSection(), **values)


def rows_of(made) -> dict[str, Row]:
    return {item.kind: item for item in made if isinstance(item, Row)}


@pytest.mark.parametrize("dialect", ["paper", "released"])
def test_a_spoken_question_gives_every_row_that_it_can(dialect):
    rows = rows_of(builder(dialect=dialect).of_utterance(QUESTION))
    assert set(rows) == {"units", "transcribe", "s2s", "s2t"}
    assert rows["units"] == Row("units-q1", "units", "", "<sosp><1><2><3><eosp>", "plus", "train")
    assert rows["s2s"].prefix == META
    assert read_row(dialect, rows["s2s"].plain_text) == [Exchange("s2s", "what is two", "it is two", (1, 2, 3), (7, 8))]
    assert read_row(dialect, rows["s2t"].plain_text) == [Exchange("s2t", "what is two", "it is two", (1, 2, 3))]
    (task,) = read_row(dialect, rows["transcribe"].plain_text)
    assert (task.answer, task.question_units) == ("what is two", (1, 2, 3))
    assert task.description in descriptions("transcribe")


def test_a_written_question_gives_text_and_the_chains_from_text():
    rows = rows_of(builder().of_question(WrittenQuestion("w", "plus", "what is two", "it is two")))
    assert set(rows) == {"text", "t2s", "t2t"}
    assert read_row("paper", rows["t2s"].plain_text) == [Exchange("t2s", "what is two", "it is two", (), (7, 8))]


def test_rows_are_in_the_form_that_the_model_reads():
    spoken = RowBuilder(PromptFormat("paper", META, "spoken"), InstructionsSection(), 1, {"It is 2!": (7, 8)})
    rows = rows_of(spoken.of_question(WrittenQuestion("w", "plus", "What's 1 + 1?", "It is 2!")))
    assert read_row("paper", rows["t2s"].plain_text) == [Exchange("t2s", "whats one plus one", "it is two", (), (7, 8))]


def test_recognition_or_speaking_by_probability():
    clips = [Utterance(f"a{n}", (1, 2), "hello", is_answer_voice=True) for n in range(2000)]
    section = InstructionsSection(transcribe_probability=0.3)
    made = Counter(item.kind for clip in clips for item in builder(section).of_utterance(clip))
    assert made["transcribe"] + made["speak"] == 2000
    assert 0.26 < made["transcribe"] / 2000 < 0.34


def test_only_the_answer_voice_is_spoken_in():
    section = InstructionsSection(transcribe_probability=0)
    clips = [Utterance(f"o{n}", (1, 2), "hello") for n in range(50)]
    assert {item.kind for clip in clips for item in builder(section).of_utterance(clip)} == {"units", "transcribe"}


def test_a_clip_without_text_gives_its_units_alone():
    row, refusal = builder().of_utterance(Utterance("n", (1, 2), " "))
    assert row.kind == "units" and refusal == Refusal("n", "transcribe", "no_text")


def test_long_answers_stay_out_of_chains_but_not_out_of_text():
    answer = " ".join(["word"] * 35)
    made = list(builder(spoken_answers={answer: (1,)}).of_question(WrittenQuestion("w", "", "why", answer)))
    assert [item.kind for item in made if isinstance(item, Row)] == ["text"]
    assert Refusal("w", "t2t", "long_answer") in made and Refusal("w", "t2s", "long_answer") in made
    shorter = answer.removesuffix(" word")
    kept = builder(spoken_answers={shorter: (1,)}).of_question(WrittenQuestion("w", "", "why", shorter))
    assert set(rows_of(kept)) == {"text", "t2s", "t2t"}


def test_an_answer_that_nobody_spoke_is_counted():
    made = list(builder(spoken_answers={}).of_utterance(QUESTION))
    assert Refusal("q1", "s2s", "no_answer_speech") in made
    assert "s2t" in rows_of(made)


@pytest.mark.parametrize("text", ["say [ta]", "<12> apples", "a <eoa> b", "[Human]: hello"])
def test_text_with_markers_is_refused_and_counted(text):
    made = list(builder().of_question(WrittenQuestion("w", "", text, "it is two")))
    assert {item.reason for item in made if isinstance(item, Refusal)} == {"marker"}
    assert rows_of(made) == {}


def test_only_the_forms_of_the_recipe_are_made():
    section = InstructionsSection(forms=("s2t",))
    assert set(rows_of(builder(section).of_utterance(QUESTION))) == {"units", "transcribe", "s2t"}
    assert set(rows_of(builder(section).of_question(WrittenQuestion("w", "", "what", "it is two")))) == {"text"}


def test_multi_turn_rows_remember_an_earlier_question_as_text():
    past = (
        WrittenQuestion("p", "", "what color is snow", "snow is white"),
        WrittenQuestion("q", "", "what is two", "it is two"),
    )
    section = InstructionsSection(multi_turn=1)
    rows = rows_of(builder(section, past=past).of_utterance(QUESTION))
    first, last = read_row("paper", rows["s2s"].plain_text)
    assert first == Exchange("t2t", "what color is snow", "snow is white")
    assert last == Exchange("s2s", "what is two", "it is two", (1, 2, 3), (7, 8))
    assert len(read_row("paper", rows["transcribe"].plain_text)) == 1
    halves = [
        len(
            read_row(
                "paper",
                rows_of(builder(InstructionsSection(multi_turn=0.5), past=past).of_utterance(clip))["s2t"].plain_text,
            )
        )
        for clip in (Utterance(f"m{n}", (1,), "what is two", answer="it is two") for n in range(300))
    ]
    assert 100 < halves.count(2) < 200


def test_a_rows_chances_are_its_own():
    """Whichever rows are made before it, and by whom."""
    alone = list(builder().of_utterance(QUESTION))
    one = builder()
    for n in range(5):
        list(one.of_utterance(Utterance(f"x{n}", (1,), "hello", is_answer_voice=True)))
    assert list(one.of_utterance(QUESTION)) == alone
    wordings = {
        read_row("paper", rows_of(builder(seed=seed).of_utterance(QUESTION))["transcribe"].plain_text)[0].description
        for seed in range(40)
    }
    assert len(wordings) > 8


def test_no_more_wordings_than_the_recipe_takes():
    section = InstructionsSection(descriptions=2)
    wordings = {
        read_row("paper", rows_of(builder(section, seed=seed).of_utterance(QUESTION))["transcribe"].plain_text)[
            0
        ].description
        for seed in range(40)
    }
    assert wordings == set(descriptions("transcribe")[:2])


def test_a_direct_row_has_no_transcript_and_is_made_only_if_asked_for():
    assert "direct" not in rows_of(builder().of_utterance(QUESTION))
    section = InstructionsSection(forms=("s2s", "direct"))
    row = rows_of(builder(section).of_utterance(QUESTION))["direct"]
    assert row.id == "direct-q1" and "what is two" not in row.plain_text
    assert read_row("paper", row.plain_text) == [Exchange("direct", "", "it is two", (1, 2, 3), (7, 8))]
    assert Refusal("q1", "direct", "no_answer_speech") in builder(section, spoken_answers={}).of_utterance(QUESTION)


def test_a_standard_row_is_speech_for_speech_without_a_word():
    assert "standard" not in rows_of(builder().of_utterance(QUESTION))
    row = rows_of(builder(InstructionsSection(forms=("s2s", "standard"))).of_utterance(QUESTION))["standard"]
    assert "two" not in row.plain_text
    assert read_row("paper", row.plain_text) == [Exchange("standard", "", "", (1, 2, 3), (7, 8))]


def test_a_turn_of_a_dialogue_brings_its_own_past():
    past = (WrittenQuestion("p", "", "what color is snow", "snow is white"),)
    clip = Utterance("q1", (1, 2, 3), "what is two", "plus", "it is two", earlier=(("hi", "hello"),))
    rows = rows_of(builder(InstructionsSection(multi_turn=1), past=past).of_utterance(clip))
    assert read_row("paper", rows["s2t"].plain_text)[:-1] == [Exchange("t2t", "hi", "hello")]
    assert len(read_row("paper", rows["transcribe"].plain_text)) == 1


def test_units_that_were_not_written_are_counted():
    turn = AskedTurn("t", "what is two", "it is two")
    every = InstructionsSection(forms=("s2s", "s2t", "t2s", "t2t", "direct"))
    made = list(builder(every, spoken_answers={}).of_written_speech(turn, "c", (1, 2), ()))
    assert [item.kind for item in made if isinstance(item, Row)] == ["s2t"]
    assert [item for item in made if isinstance(item, Refusal)] == [
        Refusal("t", kind, "unspoken") for kind in ("s2s", "direct", "t2s")
    ]


# Text that looks like a template as closely as text without a marker can.
pieces = st.sampled_from(
    [
        *("This is input:", " This is input: ", ". And your response should be speech.", "You can do it step by step."),
        *("This is a text instruction: ", "; ", ".", "?", "a", " b", "\n", "Human", "[", "]: ", "<", ">", "1"),
    ]
)
words = (st.text(min_size=1) | st.lists(pieces, min_size=1, max_size=6).map("".join)).map(str.strip).filter(bool)
units = st.lists(st.integers(0, 999), min_size=1, max_size=8).map(tuple)


@pytest.mark.parametrize("dialect", ["paper", "released"])
@given(text=words, answer=words, heard=units, spoken=units, voice=st.booleans())
def test_every_row_reads_back_as_what_it_was_made_from(dialect, text, answer, heard, spoken, voice):
    clip = Utterance("u", heard, text, "c", answer, voice)
    past = (WrittenQuestion("p", "", "what color is snow", "snow is white"),)
    make = builder(InstructionsSection(multi_turn=0.5), dialect, spoken_answers={answer: spoken}, past=past)
    made = [*make.of_utterance(clip), *make.of_question(WrittenQuestion("w", "", text, answer))]
    hostile = find_marker(text) or find_marker(answer)
    assert any(isinstance(item, Refusal) for item in made) == bool(hostile)
    for row in made:
        if not isinstance(row, Row) or row.kind == "units":
            continue
        last = read_row(dialect, row.plain_text)[-1]
        assert last.kind == row.kind
        assert text in (last.question, last.answer)
        assert last.kind in ("transcribe", "speak") or last.answer == answer
        assert last.question_units in ((), heard) and last.answer_units in ((), heard, spoken)


@pytest.mark.parametrize("dialect", ["paper", "released"])
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    heard=units,
    spoken=units,
    history=st.integers(0, 3),
)
def test_every_row_of_a_dialogue_reads_back_as_what_it_was_made_from(dialect, turns, heard, spoken, history):
    forms = ("s2s", "s2t", "t2s", "t2t", "direct", "standard")
    make = builder(InstructionsSection(forms=forms, questions={"history": history}), dialect, spoken_answers={})
    talk = Conversation("d", "c", tuple(turns))
    hostile = any(find_marker(text) for turn in turns for text in turn)
    made = [*make.of_conversation(talk, ("t2t",))]
    expected = {"text-d": [Exchange("text", *turn) for turn in turns]}
    for turn in talk.asked(history, make.section.max_answer_words):
        made += make.of_written_speech(turn, "c", heard, spoken)
        earlier = [Exchange("t2t", *pair) for pair in turn.earlier]
        question, answer = turn.question, turn.answer
        last = [
            Exchange("t2t", question, answer),
            Exchange("t2s", question, answer, (), spoken),
            Exchange("s2t", question, answer, heard),
            Exchange("s2s", question, answer, heard, spoken),
            Exchange("direct", "", answer, heard, spoken),
            Exchange("standard", "", "", heard, spoken),
        ]
        expected |= {f"{exchange.kind}-{turn.id}": [*earlier, exchange] for exchange in last}
    read = {row.id: read_row(dialect, row.plain_text) for row in made if isinstance(row, Row)}
    if hostile:
        assert all(read[name] == expected[name] for name in read)
        assert any(item.reason == "marker" for item in made if isinstance(item, Refusal))
    else:
        assert read == expected


def test_a_tally_counts_rows_and_refusals():
    made = [*builder().of_utterance(QUESTION), Refusal("x", "s2s", "marker"), Refusal("y", "s2s", "marker")]
    counted = tally(made)
    assert counted == {
        "rows": {"s2s": 1, "s2t": 1, "transcribe": 1, "units": 1},
        "refused": {"s2s: marker": 2},
        "examples": {"s2s: marker": ["x", "y"]},
    }
    more = tally([Refusal(f"z{n}", "s2s", "marker") for n in range(9)])
    assert more["refused"] == {"s2s: marker": 9} and more["examples"] == {"s2s: marker": ["z0", "z1", "z2", "z3", "z4"]}
    both = total([counted, more])
    assert both["rows"] == counted["rows"] and both["refused"] == {"s2s: marker": 11}
    assert both["examples"] == {"s2s: marker": ["x", "y", "z0", "z1", "z2"]}
