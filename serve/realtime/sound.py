"""Sound on its way in and out of a session: base64 of a wire format to 16 kHz samples, and samples to that format."""

import base64
import io
from typing import TYPE_CHECKING

from serve.errors import ApiError
from serve.realtime.session_config import AudioFormat, Pcm

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000
"""Hz: of the model, and of all that is counted in samples here."""


def rate_of(format: AudioFormat) -> int:
    """Hz on the wire."""
    return format.rate if isinstance(format, Pcm) else 8_000


def milliseconds(samples: int) -> int:
    return samples * 1000 // RATE


def decode_base64(audio: str, param: str) -> bytes:
    try:
        return base64.b64decode(audio, validate=True)
    except ValueError:
        raise ApiError(400, f"{param} is not base64", code="invalid_base64", param=param) from None


class Incoming:
    """One client's stream of sound, resampled with state: however it is cut into messages, the samples are the same."""

    def __init__(self, format: AudioFormat) -> None:
        import soxr

        self._format = format
        self._resampler = soxr.ResampleStream(rate_of(format), RATE, 1, dtype="float32")
        self._half = b""

    def push(self, data: bytes, *, last: bool = False) -> "np.ndarray":
        """float32 [samples] that are certain by now; the resampler holds back a few milliseconds until `last`."""
        import numpy as np

        data = self._half + data
        whole = len(data) // 2 * 2 if isinstance(self._format, Pcm) else len(data)
        data, self._half = data[:whole], data[whole:]
        return self._resampler.resample_chunk(np.ascontiguousarray(to_wave(data, self._format)), last=last)


def to_wave(data: bytes, format: AudioFormat) -> "np.ndarray":
    """float32 [samples] at the format's own rate; of whole samples."""
    import numpy as np
    import soundfile

    if isinstance(format, Pcm):
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768
    if not data:
        return np.zeros(0, np.float32)
    raw = {"channels": 1, "samplerate": 8_000, "format": "RAW", "subtype": _law(format)}
    return soundfile.read(io.BytesIO(data), dtype="float32", **raw)[0]


def from_pcm16(data: bytes, format: AudioFormat) -> bytes:
    """Whole 16-bit samples at the format's rate, as the format has them."""
    import numpy as np
    import soundfile

    if isinstance(format, Pcm):
        return data
    buffer = io.BytesIO()
    soundfile.write(buffer, np.frombuffer(data, "<i2"), 8_000, format="RAW", subtype=_law(format))
    return buffer.getvalue()


def seconds_of(size: int, format: AudioFormat) -> float:
    """Length of so many bytes on the wire."""
    return size / (rate_of(format) * (2 if isinstance(format, Pcm) else 1))


def _law(format: AudioFormat) -> str:
    return "ULAW" if format.type == "audio/pcmu" else "ALAW"
