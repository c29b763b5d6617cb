"""Which dialogues of a question set become rows, and why the others do not.

One reason a dialogue, the first that holds, so that what is kept and what is refused add up to what there was.
"""

import hashlib
import re
from typing import Literal

from speechgpt.language.config import QuestionsSection
from speechgpt.language.conversations import Conversation
from speechgpt.language.prompts import Exchange
from speechgpt.language.row_filter import asks_for_style, is_personal, matches
from speechgpt.language.segments import find_marker
from speechgpt.language.spoken_language import is_in

Reason = Literal["marker", "language", "harmful", "personal", "style", "long_question", "duplicate"]
_WORDS = re.compile(r"\w+")


class QuestionFilter:
    """Judges dialogues in the order of their files, of which it remembers the questions (16 bytes each).

    spoken: what is not to be spoken may be long, and ask for a style.
    """

    def __init__(self, section: QuestionsSection, *, spoken: bool = True) -> None:
        self._section, self._spoken = section, spoken
        self._asked: set[bytes] = set()

    def reason(self, talk: Conversation) -> Reason | None:
        """Why it is refused; None for one that is kept, which later ones may be duplicates of."""
        on = self._section
        texts = [text for turn in talk.turns for text in turn]
        if any(map(find_marker, texts)):
            return "marker"
        if on.language and not self._in_language(talk):
            return "language"
        if on.harmful and any(matches("harmful", text) for text in texts):
            return "harmful"
        if on.personal and any(map(is_personal, texts)):
            return "personal"
        if on.style and self._spoken and any(asks_for_style(Exchange("s2s", question)) for question, _ in talk.turns):
            return "style"
        if self._spoken and any(len(question.split()) > on.max_question_words for question, _ in talk.turns):
            return "long_question"
        if on.duplicates and not self._is_new(talk):
            return "duplicate"
        return None

    def _in_language(self, talk: Conversation) -> bool:
        wanted = self._section.language
        assert wanted is not None
        if talk.language and talk.language.partition("-")[0] != wanted:
            return False
        # A turn by itself: in a long dialogue a foreign one would be outvoted.
        return all(is_in(" ".join(turn), wanted) for turn in talk.turns)

    def _is_new(self, talk: Conversation) -> bool:
        words = "\n".join(" ".join(_WORDS.findall(question.casefold())) for question, _ in talk.turns)
        key = hashlib.blake2b(words.encode(), digest_size=16).digest()
        if key in self._asked:
            return False
        self._asked.add(key)
        return True
