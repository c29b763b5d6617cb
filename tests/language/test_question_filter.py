"""What is refused of a question set, once, and for the first reason."""

import pytest

from speechgpt.language.config import QuestionsSection
from speechgpt.language.conversations import Conversation
from speechgpt.language.question_filter import QuestionFilter
from speechgpt.language.spoken_language import is_in

GOOD = ("What do bees make?", "Bees make honey.")


def talk(*turns: tuple[str, str], language: str = "") -> Conversation:
    return Conversation("t", "c", turns, language)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (("Say [ta] now", "No."), "marker"),
        (("什么是蜂蜜？", "蜂蜜是甜的。"), "language"),
        (("¿Qué es la miel y por qué es tan dulce?", "Es muy dulce, porque las abejas la hacen."), "language"),
        (("What is bullshit?", "A rude word."), "harmful"),
        (("Who can help?", "Write to jane@example.org."), "personal"),
        (("Can you whisper a poem?", "I can not."), "style"),
        (("why " * 61, "Because."), "long_question"),
    ],
)
def test_each_reason(turn, reason):
    judge = QuestionFilter(QuestionsSection())
    assert judge.reason(talk(turn)) == reason
    assert judge.reason(talk(GOOD, turn)) == reason, "one turn speaks against the whole dialogue"
    assert judge.reason(talk(GOOD)) is None
    switch = {"language": {"language": None}, "long_question": {"max_question_words": 100}}.get(reason, {reason: False})
    if reason != "marker":
        assert QuestionFilter(QuestionsSection(**switch)).reason(talk(turn)) is None


def test_duplicates_are_questions_that_sound_alike():
    judge = QuestionFilter(QuestionsSection())
    assert judge.reason(talk(GOOD)) is None
    assert judge.reason(talk(("what do bees make", "Wax."))) == "duplicate"
    assert judge.reason(talk(GOOD, ("And what do they eat?", "Pollen."))) is None
    lenient = QuestionFilter(QuestionsSection(duplicates=False))
    assert [lenient.reason(talk(GOOD)) for _ in range(2)] == [None, None]


def test_what_was_refused_makes_nothing_a_duplicate():
    judge = QuestionFilter(QuestionsSection())
    assert judge.reason(talk(("What do bees make?", "Shit."))) == "harmful"
    assert judge.reason(talk(GOOD)) is None


def test_a_row_that_names_its_language_is_believed():
    assert QuestionFilter(QuestionsSection()).reason(talk(GOOD, language="es")) == "language"
    assert QuestionFilter(QuestionsSection()).reason(talk(GOOD, language="en-gb")) is None


SENTENCES = {
    "de": "Die Bienen machen den Honig, und das ist nicht leicht für sie.",
    "en": "The bees make honey, and that is what they are good at.",
    "es": "Las abejas hacen la miel con el polen de las flores, y es muy dulce.",
    "fr": "Les abeilles font le miel dans la ruche avec du pollen, et il est sucré.",
    "it": "Le api che sono nella casa della regina non fanno questo per gli altri.",
    "nl": "Het is niet zo dat een bij van honing houdt, maar wat eet ze dan met ons?",
    "pt": "As abelhas não comem isso, você sabe como é com uma colmeia pela manhã.",
    "ru": "Пчёлы делают мёд, и это не так просто, как кажется.",
    "uk": "Бджоли роблять мед, і це не так просто, як це здається, але вони вміють.",
    "zh": "蜜蜂酿造蜂蜜。",
    "ja": "みつばちは はちみつを つくります。",
    "ko": "꿀벌은 꿀을 만든다.",
    "ar": "النحل يصنع العسل.",
    "el": "Οι μέλισσες φτιάχνουν μέλι.",
    "hi": "मधुमक्खियाँ शहद बनाती हैं।",
    "he": "דבורים מייצרות דבש.",
    "th": "ผึ้งทำน้ำผึ้ง",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_language_and_in_no_other(language):
    assert is_in(SENTENCES[language], language)
    mistaken = {other for other in SENTENCES if other != language and is_in(SENTENCES[language], other)}
    # Han characters alone are Japanese or Korean as well.
    assert mistaken <= ({"ja", "ko"} if language == "zh" else set())


@pytest.mark.parametrize(
    "text", ["Bonjour means hello.", "E = mc²", "42", "", "Who wrote Les Misérables?", "Does π matter?", "OK"]
)
def test_names_formulas_and_little_words_stay(text):
    assert is_in(text, "en")
