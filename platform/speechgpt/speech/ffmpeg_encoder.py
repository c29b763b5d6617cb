"""MP3 and AAC by FFmpeg's libraries, as the sound comes."""

import io
from typing import Any, Literal

import numpy as np

_BITS_A_SECOND = 64_000
# Without MP3's table of contents, which stands at the front and is written last.
_WRITTEN: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp3": ("mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
    "aac": ("adts", "aac", {}),
}
"""Container, codec and options."""


class Taken:
    """A file in memory of which each byte is given once."""

    def __init__(self) -> None:
        self.file = io.BytesIO()

    def take(self) -> bytes:
        data = self.file.getvalue()
        self.file.seek(0)
        self.file.truncate()
        return data


class FfmpegEncoder:
    """One clip. rate: Hz, of the waves and inside."""

    def __init__(self, format: Literal["mp3", "aac"], rate: int) -> None:
        import av

        container, codec, options = _WRITTEN[format]
        self._taken = Taken()
        self._container = av.open(self._taken.file, "w", format=container, options=options)
        stream: Any = self._container.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = _BITS_A_SECOND
        self._stream = stream
        self._rate, self._samples = rate, 0

    def push(self, wave: np.ndarray) -> bytes:
        """wave: [samples]. The bytes that are certain by now, perhaps none."""
        import av

        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None], np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = self._rate, self._samples
        self._samples += len(wave)
        self._container.mux(self._stream.encode(frame))
        return self._taken.take()

    def finish(self) -> bytes:
        if self._samples:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._taken.take()
