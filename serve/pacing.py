"""How many units the vocoder is given at a time: what it needs to begin, then few, so that sound comes soon, then more,
for less work."""

FEWEST, GROWTH, MOST = 10, 1.25, 64
"""Units. A piece must be generated while the one before it is heard, so it may be longer by as much as generation is
faster than speech; units come about 30 a second."""


class Pacing:
    """The units of one reply in pieces: a first one, and further ones that grow. Their sizes depend on nothing but
    their number."""

    def __init__(self, first: int = FEWEST) -> None:
        """first: units of the first piece (see `voice.first_piece`)."""
        self._held: list[int] = []
        self._size, self._next = float(first), float(FEWEST)

    def push(self, units: list[int]) -> list[list[int]]:
        """Take units; give the pieces that are full."""
        self._held += units
        pieces = []
        while len(self._held) >= int(self._size):
            pieces.append(self._held[: int(self._size)])
            del self._held[: int(self._size)]
            self._size, self._next = self._next, min(self._next * GROWTH, MOST)
        return pieces

    def finish(self) -> list[list[int]]:
        """What is left."""
        rest, self._held = self._held, []
        return [rest] if rest else []
