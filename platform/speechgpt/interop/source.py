"""Bytes that a reader walks through, none of which it believes in before they are there."""


class Source:
    """A position in a buffer (bytes, or a mapped file), with what `pickletools` asks of a file.

    `read(n)` gives fewer than n bytes where fewer are left, and allocates no more than it gives, whatever n is.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        start = self.position
        self.position = min(start + max(count, 0), len(self.data))
        return bytes(self.data[start : self.position])

    def readline(self) -> bytes:
        line = b""
        while not line.endswith(b"\n") and (piece := self.read(256)):
            line += piece
        end = line.find(b"\n") + 1
        if end:
            self.position -= len(line) - end
            line = line[:end]
        return line

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, not copied. Raises ValueError where fewer are left."""
        if count < 0 or count > self.left:
            raise ValueError(f"{count} bytes are announced and {self.left} are left")
        self.position += count
        return self.data[self.position - count : self.position]
