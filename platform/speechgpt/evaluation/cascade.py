"""A cascade made of one model's own tasks: write down what is heard, answer what is read, read that aloud.

Each step sees only the last one's words, as in the paper's baselines (recogniser, text model, synthesiser; SPEC 1.6).
"""

from collections.abc import Callable, Sequence

from speechgpt.language.answers import Answer

NOTHING = Answer(None, None, None, False, "stop")
"""What comes of a question that no words came of."""


def cascade(
    transcripts: Sequence[str],
    think: Callable[[Sequence[str]], Sequence[Answer]],
    speak: Callable[[Sequence[str]], Sequence[Answer]] | None,
) -> list[Answer]:
    """The answer to each transcript; where one step gives nothing, the later ones have nothing to do.

    think: text answers to questions; speak: texts read aloud, None: nothing is to be.
    """
    heard = [place for place, words in enumerate(transcripts) if words.strip()]
    thought = dict(zip(heard, think([transcripts[place] for place in heard]) if heard else (), strict=True))
    told = [place for place in heard if (thought[place].text or "").strip()] if speak else []
    aloud = dict(zip(told, speak([thought[place].text or "" for place in told]) if speak and told else (), strict=True))
    replies = []
    for place, words in enumerate(transcripts):
        answer = thought.get(place, NOTHING)
        if speak:
            answer = _spoken(answer, aloud.get(place, NOTHING))
        replies.append(answer._replace(transcript=words.strip() or None))
    return replies


def _spoken(answer: Answer, said: Answer) -> Answer:
    cut = "length" in (answer.finish, said.finish)
    return answer._replace(
        units=said.units, well_formed=answer.well_formed and said.well_formed, finish="length" if cut else "stop"
    )
