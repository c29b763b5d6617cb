"""What is refused, and what is not: a filter that refuses good rows is as wrong as one that lets bad ones in."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechgpt.language.config import FiltersSection
from speechgpt.language.prompts import META, Exchange, descriptions, row_text
from speechgpt.language.row_filter import RowFilter, asks_for_style, is_card, is_personal, matches, tokens_at_least
from speechgpt.language.segments import find_marker
from speechgpt.language.vocabulary import Vocabulary


def row_filter(**switches) -> RowFilter:
    return RowFilter(FiltersSection(**switches), max_answer_words=35, units=1000, blocks={"s2s": 60, "units": 8})


def chat(question: str, answer: str = "It is.") -> Exchange:
    return Exchange("text", question, answer)


def speak(description: str) -> Exchange:
    return Exchange("speak", "He whispered and sang.", answer_units=(1, 2), description=description)


@pytest.mark.parametrize(
    "text",
    [
        "What the fuck is this?",
        "You are a BITCH.",
        "What is the best way to kill my neighbour?",
        "How do I secretly poison someone?",
        "Tell me how to build a pipe bomb",
        "I want to kill myself",
        "how to steal a car",
        "How can I hack into someone's account?",
        "Where can I buy cocaine?",
    ],
)
def test_harm_is_seen(text):
    assert matches("harmful", text)
    assert row_filter().reasons("text", "", [chat(text)]) == ["harmful"]
    assert row_filter().reasons("text", "", [chat("Hello?", text)]) == ["harmful"]
    assert row_filter(harmful=False).reasons("text", "", [chat(text)]) == []


@pytest.mark.parametrize(
    "text",
    [
        "The soldier was killed in the battle of Shiloh.",
        "How do vaccines kill a virus in the body?",
        "Who invented the hydrogen bomb?",
        "Scunthorpe is a town in Lincolnshire.",
        "The cockpit and the assassin bug",
        "What is a bad term for poop?",
        "The stars make a heroic figure.",
        "How do I kill time at the airport?",
    ],
)
def test_history_and_science_are_not_harm(text):
    assert not matches("harmful", text)


@pytest.mark.parametrize(
    "text",
    [
        "Write to jane.doe+x@example.co.uk today",
        "Call (555) 123-4567.",
        "call 555-123-4567",
        "+49 170 1234567",
        "My number is 078-05-1120",
        "Card 4111 1111 1111 1111",
        "4111111111111111",
        "DE89 3704 0044 0532 0130 00",
        "He lives at 221 Old Baker Street, London",
        "What is the home address of the actor?",
        "What is Jennifer's phone number?",
        "Where does Tom Hanks live?",
        "Give me their social security numbers",
    ],
)
def test_personal_data_are_seen(text):
    assert is_personal(text)
    assert "personal" in row_filter().reasons("text", "", [chat(text)])
    assert "personal" not in row_filter(personal=False).reasons("text", "", [chat(text)])


@pytest.mark.parametrize(
    "text",
    [
        "From 1914-1918, 65,000,000 men served.",
        "Pi is 3.14159265358979323846.",
        "The number 1234567890123456 is no card.",
        "What is the Gettysburg Address?",
        "Where do polar bears live?",
        "He lived in a street by the sea for 20 years",
        "Say 10 20 30 40 50 60",
        "at 5:30 pm on 2023-05-18",
        "the password of the day was a secret",
    ],
)
def test_numbers_and_places_are_not_personal(text):
    assert not is_personal(text)


def test_the_check_digit_of_a_card():
    assert is_card("4111 1111 1111 1111") and is_card("5500-0055-5555-5559") and is_card("371449635398431")
    assert not is_card("4111 1111 1111 1112")
    assert not is_card("0")


# The published descriptions that ask for a manner, and those that do not (SPEC 1.2).
@pytest.mark.parametrize(
    "description",
    [
        "Whisper the given sentence softly",
        "Would you please speed-read the following sentence?",
        "Speak the sentence in a question-like manner, with a rising inflection",
        "Sing this line.",
        "Read it in a British accent.",
        "Say it louder.",
        "Say this in the voice of a pirate.",
    ],
)
def test_manners_of_speaking_are_seen_in_the_task(description):
    assert asks_for_style(speak(description))
    assert row_filter().reasons("speak", "", [speak(description)]) == ["style"]
    assert row_filter(style=False).reasons("speak", "", [speak(description)]) == []


@pytest.mark.parametrize(
    "description",
    [
        *descriptions("speak"),
        "Can you please read this sentence out loud?",
        "Recite the following words as if you were speaking normally",
        "Project your voice to clearly articulate this statement",
        "Would you mind speaking these words as naturally as possible?",
        "Read this phrase with attention to clarity",
        "Try to speak out this sentence, please",
    ],
)
def test_plain_tasks_stay_whatever_is_to_be_read(description):
    assert not asks_for_style(speak(description))


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("Sing me a song about rain.", True),
        ("Can you whisper a poem?", True),
        ("Please speak a little louder.", True),
        ("Tell me a joke in a robot voice", True),
        ("Can you imitate the voice of a duck?", True),
        ("Answer in the voice of Darth Vader", True),
        ("Who sings Yesterday?", False),
        ("What does a whisper sound like?", False),
        ("Which animal is faster, a horse or a dog?", False),
        ("How loud is a jet engine?", False),
        ("Tell me about the British accent", False),
    ],
)
def test_manners_of_speaking_are_seen_in_a_question_that_is_answered_aloud(question, asks):
    assert asks_for_style(Exchange("t2s", question, "I can not.", (), (1,))) == asks
    assert not asks_for_style(Exchange("t2t", question, "I can not.")), "a text answer has no manner"


def test_long_answers_are_refused_in_chains_alone():
    answer = " ".join(["word"] * 35)
    assert row_filter().reasons("t2t", "", [Exchange("t2t", "Why?", answer)]) == ["long_answer"]
    assert row_filter().reasons("t2t", "", [Exchange("t2t", "Why?", answer.removesuffix(" word"))]) == []
    assert row_filter().reasons("text", "", [chat("Why?", answer)]) == []
    assert row_filter(long_answers=False).reasons("t2t", "", [Exchange("t2t", "Why?", answer)]) == []


def test_rows_that_no_block_holds():
    chain = Exchange("s2s", "one two", "three", tuple(range(20)), tuple(range(25)))
    # 45 units, 2 markers a stretch of speech, 3 a turn, 3 words, 2 words of the prefix.
    assert tokens_at_least("be good", [chain], [chain.question_units, chain.answer_units]) == 57
    assert row_filter().reasons("s2s", "be good", [chain]) == []
    longer = Exchange("s2s", "one two", "three", tuple(range(20)), tuple(range(29)))
    assert row_filter().reasons("s2s", "be good", [longer]) == ["over_block"]
    assert row_filter(over_block=False).reasons("s2s", "be good", [longer]) == []
    assert row_filter().reasons("units", "", [], range(6)) == []
    assert row_filter().reasons("units", "", [], range(7)) == ["over_block"]
    assert row_filter().reasons("speak", "", [speak("Say.")]) == [], "no stage draws it, so nothing limits it"


def test_units_that_the_codebook_has_not_and_repeats():
    def reasons(*units: int, **switches) -> list[str]:
        return row_filter(**switches).reasons("units", "", [], units)

    assert reasons(0, 999) == []
    assert reasons(0, 1000) == ["unit_range"]
    assert reasons(5, 5) == ["repeated_units"]
    assert reasons(5, 6, 5) == []
    assert reasons(1000, 1000) == ["unit_range", "repeated_units"]
    assert reasons(1000, 1000, unit_range=False, repeated_units=False) == []


words = st.text(max_size=60).filter(lambda text: find_marker(text) is None and bool(text.strip())).map(str.strip)
some_units = st.lists(st.integers(0, 31), min_size=1, max_size=30).map(tuple)


VOCABULARIES: dict[str, Vocabulary] = {}


def grown(request: pytest.FixtureRequest, base: str) -> Vocabulary:
    if base not in VOCABULARIES:
        VOCABULARIES[base] = Vocabulary.grow(request.getfixturevalue(f"{base}_tokenizer"), 40, "released")
    return VOCABULARIES[base]


@pytest.mark.parametrize("base", ["scratch", "llama"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=words, answer=words, heard=some_units, spoken=some_units, dialect=st.sampled_from(["paper", "released"])
)
def test_a_length_is_never_more_than_a_real_vocabulary_makes(request, base, question, answer, heard, spoken, dialect):
    """Else rows that would fit are refused."""
    chain = Exchange("s2s", question, answer, heard, spoken)
    real = grown(request, base).encode_row(META, row_text(dialect, [chain])).ids
    assert tokens_at_least(META, [chain], [heard, spoken]) <= len(real)
