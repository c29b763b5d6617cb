"""The closed world is learnable, stable, and fair in what it holds out."""

import subprocess
import sys
from collections import Counter

import pytest

from speechgpt.language import world
from speechgpt.language.config import WorldSection
from speechgpt.language.numbers import in_words
from speechgpt.language.segments import find_marker
from speechgpt.language.world import WorldError
from speechgpt.recipe import load

NANO = world.load(WorldSection(wordings="all"), seed=1)
QUESTIONS = NANO.questions()
TOPICS = "topics: [{category: sums, words: [a, b], ask: ['say {word}', 'repeat {word}'], answer: '{word}'}]\n"


def test_it_has_the_size_that_nano_is_planned_for():
    assert 3600 <= len(QUESTIONS) <= 3900
    assert 2400 <= len(world.load(load("nano").world, 1).questions()) <= 2700
    assert len(NANO.outside()) >= 120
    sentences = [text for q in [*QUESTIONS, *NANO.outside()] for text in (q.question, q.answer)]
    assert len({word for sentence in sentences for word in sentence.split()}) <= 550
    assert all(len(q.answer.split()) <= 12 for q in QUESTIONS)


def test_questions_are_lower_case_words_and_ids_are_their_own():
    for q in [*QUESTIONS, *NANO.outside()]:
        for text in (q.question, q.answer):
            assert text and all(word.isalpha() and word.islower() for word in text.split(" ")), text
            assert find_marker(text) is None
    assert len({q.id for q in QUESTIONS}) == len({q.question for q in QUESTIONS}) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what is two plus three", "two plus three is five"),
        ("take five from twelve", "twelve minus five is seven"),
        ("multiply ten by ten", "ten times ten is one hundred"),
        ("which is bigger twelve or three", "twelve is bigger"),
        ("which is smaller three or twelve", "three is smaller"),
        ("what number comes after forty nine", "fifty comes after forty nine"),
        ("which number is before one", "zero comes before one"),
        ("what day comes after sunday", "monday comes after sunday"),
        ("which month is before january", "december comes before january"),
        ("tell me the opposite of cold", "the opposite of cold is hot"),
        ("what is the capital of norway", "the capital of norway is oslo"),
        ("what color is an elephant", "an elephant is gray"),
        ("how many legs does an owl have", "an owl has two legs"),
        ("is an apple a fruit", "yes an apple is a fruit"),
        ("repeat the word water", "water"),
    ],
)
def test_it_knows_its_facts(question, answer):
    assert {q.question: q.answer for q in QUESTIONS}[question] == answer


def test_sums_are_right():
    number = {in_words(n): n for n in range(101)}
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    for q in QUESTIONS:
        if q.category in signs:
            left, result = q.answer.split(" is ")
            a, b = left.split(f" {q.category} ")
            assert signs[q.category](number[a], number[b]) == number[result]


def test_members_belong_to_one_group_and_are_denied_others():
    said = Counter(q.answer.split()[0] for q in QUESTIONS if q.category == "class")
    assert said["no"] == 2 * said["yes"] > 0


def test_a_tenth_is_held_out_of_every_category_but_no_fact():
    held = [q for q in QUESTIONS if q.split == "heldout"]
    assert len(held) == round(0.1 * len(QUESTIONS))
    sizes, held_sizes = Counter(q.category for q in QUESTIONS), Counter(q.category for q in held)
    assert all(abs(held_sizes[category] - 0.1 * size) <= 1 for category, size in sizes.items())
    known = {q.fact for q in QUESTIONS if q.split == "train"}
    assert all(q.fact in known for q in held)
    assert {q.split for q in NANO.outside()} == {"train", "heldout"}


def test_another_process_and_only_another_seed_gives_another_split():
    """Python's own hash differs from process to process; the split must not."""
    program = (
        "from speechgpt.language import world; from speechgpt.language.config import WorldSection;"
        "print([q.id for q in world.load(WorldSection(wordings='all'), 1).questions() if q.split == 'heldout'])"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = [q.id for q in QUESTIONS if q.split == "heldout"]
    assert there.strip() == str(here)
    assert here != [q.id for q in world.load(WorldSection(wordings="all"), 2).questions() if q.split == "heldout"]


def test_a_few_questions_are_spread_over_the_categories_with_their_facts_whole():
    few = world.load(WorldSection(max_questions=24, held_out=0.25), 1).questions()
    assert len(few) == 24
    assert max(Counter(q.category for q in few).values()) <= 3
    known = {q.fact for q in few if q.split == "train"}
    assert sum(q.split == "heldout" for q in few) == 6
    assert all(q.fact in known for q in few)


def test_a_recipe_may_ask_in_more_words():
    few = {q.question: q.answer for q in world.load(WorldSection(), 1).questions()}
    many = {q.question: q.answer for q in QUESTIONS}
    assert "give me the opposite of hot" in many and "give me the opposite of hot" not in few
    assert few.items() < many.items()
    assert set(few.values()) == set(many.values())


def test_readings_are_different_and_follow_the_seed():
    assert len(set(NANO.readings(300, 1))) == 300
    assert NANO.readings(300, 1) == NANO.readings(300, 1) != NANO.readings(300, 2)
    assert NANO.readings(0, 1) == []


def test_word_lists_hold_every_word_equally_often():
    lists = NANO.word_lists(400, 1)
    assert len(lists) == 400 and {len(text.split()) for text in lists} == {7}
    often = Counter(word for text in lists for word in text.split())
    assert set(often) == {word for q in [*QUESTIONS, *NANO.outside()] for word in f"{q.question} {q.answer}".split()}
    assert max(often.values()) - min(often.values()) <= 1
    assert lists == NANO.word_lists(400, 1) != NANO.word_lists(400, 2)
    assert NANO.word_lists(0, 1) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (TOPICS.replace("words: [a, b], ", ""), "topics.0"),
        (TOPICS.replace("'{word}'}", "'{value}'}"), "'{value}' has a slot"),
        (TOPICS + "extra: 1\n", "extra"),
        (TOPICS.replace("'{word}'}", "'{word'}"), "is no pattern"),
        ("topics: [", "not YAML"),
        ("topics: [{category: a, table: {x: y, z: w}, ask: ['what'], answer: '{value}'}]", "is asked twice"),
        (
            "topics: [{category: a, members: {b: [c]}, denials: 1, denial: 'no', ask: ['x'], answer: y}]",
            "fewer `denials`",
        ),
    ],
)
def test_a_world_that_cannot_be_used_is_refused(content, complaint, tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text(content)
    with pytest.raises(WorldError, match="world.yaml") as refused:
        world.load(WorldSection(file=str(file)), 1).questions()
    assert complaint in str(refused.value)


def test_a_world_that_is_nowhere_is_refused():
    with pytest.raises(WorldError, match="neither a shipped world nor a file"):
        world.load(WorldSection(file="atlantis"), 1)
