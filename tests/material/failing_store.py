"""A folder as a store that fails when told, for what is done about that; without a server."""

import io
from collections import Counter
from pathlib import Path


class FailingFile(io.BytesIO):
    """Gives its bytes so many times as `answers` says, 20 KB at most, and then an error as a store does."""

    def __init__(self, data: bytes, answers: int) -> None:
        super().__init__(data)
        self.answers = answers

    def read(self, size: int | None = -1, /) -> bytes:
        self.answers -= 1
        if self.answers < 0:
            raise OSError("SLOW_DOWN")
        return super().read(min(size or 0, 20_000))


class FailingStore:
    """The files of a folder; each time one is opened, it fails a read later than the time before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opened = folder, Counter[str]()

    def open_input_file(self, name: str) -> FailingFile:
        self.opened[name] += 1
        return FailingFile((self.folder / name).read_bytes(), self.opened[name] - 1)
