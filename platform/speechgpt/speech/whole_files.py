"""Whether a sound file has all the bytes that it speaks of: libsndfile decodes what is there of one that was cut off.

What a header leaves open, as where sound was streamed into a file, counts as whole; so does a file that lacks something
behind its sound. FLAC says how many samples it has: who decodes it counts them.
"""

import mmap
import re
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

Bytes = bytes | mmap.mmap


def is_cut_off(data: Bytes) -> bool:
    """Whether a sound file ends before its sound does. False for what is no sound file, or of an unknown format."""
    if data[4:8] == b"ftyp":
        return _mp4(data)
    for magic, cut_off in _FORMATS.items():
        if data[: len(magic)] == magic:
            return cut_off(data)
    return _mp3(data)


class _Chunks(NamedTuple):
    """How a file is laid out whose chunks each begin with a name and a size."""

    sound: bytes
    """Name of the chunk that holds the sound."""
    order: Literal["little", "big"]
    first: int = 12
    """Where the first chunk begins."""
    size: int = 4
    """Bytes of a chunk's size."""
    pad: int = 2
    """What a chunk's end is a multiple of."""
    counts_itself: bool = False
    """Whether a chunk's size is that of its name and size, too."""
    is_one: bool = True
    """Whether the file is itself a chunk, so that its size is told twice."""

    def chunk(self, data: Bytes, at: int) -> tuple[int, int]:
        """Of the chunk that begins there, the size that it says, and where it ends."""
        begin = at + len(self.sound) + self.size
        size = int.from_bytes(data[begin - self.size : begin], self.order)
        return size, size + (at if self.counts_itself else begin)


_MOST_CHUNKS = 1000
"""That are looked at: so many before the sound, each next to nothing, are no sound file but a trap."""


def _chunked(data: Bytes, layout: _Chunks) -> bool:
    at, head = layout.first, len(layout.sound) + layout.size
    for _ in range(_MOST_CHUNKS):
        size, end = layout.chunk(data, at)
        if data[at : at + len(layout.sound)] == layout.sound:
            break
        at = end + -end % layout.pad
    else:
        return False
    if size == 0xFFFFFFFF and data[:4] in (b"RF64", b"BW64"):
        size = int.from_bytes(data[28:36], "little")
        end = at + head + size
    if _is_open(size) or end <= len(data):
        return False
    size, end = layout.chunk(data, 0)
    # Where the file's own size is right, that of the sound is a slip of who wrote it.
    return not layout.is_one or _is_open(size) or end > len(data)


def _is_open(size: int) -> bool:
    """Whether a size is one that those write who do not know it: 0, or as much as there can be, their header excepted.

    Real sizes below 64 bytes are among them, in which there is no sound.
    """
    return (size + 4096) % 2**31 < 4096 + 64


def _au(data: Bytes, order: Literal["little", "big"]) -> bool:
    begin, size = (int.from_bytes(data[at : at + 4], order) for at in (4, 8))
    return not _is_open(size) and begin + size > len(data)


def _nist(data: Bytes) -> bool:
    said = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,18})\s", data[:1024])}
    count, channels, width = (said.get(name, 0) for name in (b"sample_count", b"channel_count", b"sample_n_bytes"))
    return 1024 + count * channels * width > len(data)


def _ogg(data: Bytes) -> bool:
    """Of the last page, whether it is not whole, or does not say that it is the last."""
    at = data.rfind(b"OggS")
    body = at + 27 + int.from_bytes(data[at + 26 : at + 27], "little")
    return body + sum(data[at + 27 : body]) > len(data) or not data[at + 5] & 4


def _mp4(data: Bytes) -> bool:
    at = 0
    for _ in range(_MOST_CHUNKS):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:
            return False
        if at + size > len(data):
            return data[at + 4 : at + 8] in (b"moov", b"moof", b"mdat")
        at += size
    return False


def _webm(data: Bytes) -> bool:
    """Whether its segment, which is all behind a header, is longer; of a recording that nobody closed, never."""
    at = 0
    for _ in ("header", "segment"):
        if len(data) < at + 12:
            return True
        at += _coded(data[at])
        length = _coded(data[at])
        most = 2 ** (7 * length) - 1
        size = int.from_bytes(data[at : at + length], "big") & most
        at += length + size
    return size != most and at > len(data)


def _coded(first: int) -> int:
    """Bytes of an EBML id or size (RFC 8794) by the first of them."""
    return 9 - first.bit_length()


def _mp3(data: Bytes) -> bool:
    """Whether the last frame is not whole: a cut falls into a frame, and all before it may sound well."""
    at = 0
    while data[at : at + 3] == b"ID3":
        size = 0
        for seven_bits in data[at + 6 : at + 10]:
            size = size << 7 | seven_bits & 127
        at += 10 + size
    while length := _frame(data[at : at + 4]):
        at += length
    return at > len(data) or (0 < len(data) - at < 4 and data[at] == 255)


_BITRATES = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
"""kbit/s of MPEG 2 (and 2.5) and MPEG 1, layer 3."""
_RATES = (44_100, 48_000, 32_000)


def _frame(head: bytes) -> int:
    """Bytes of the frame of MPEG audio, layer 3, that begins with these four; 0 if none does."""
    if len(head) < 4 or head[0] != 255 or head[1] & 0xE6 != 0xE2 or head[1] & 0x18 == 0x08:
        return 0
    version, bitrate, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if bitrate in (0, 15) or rate == 3:
        return 0
    first = version == 3
    hertz = _RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    return (144 if first else 72) * 1000 * _BITRATES[first][bitrate] // hertz + (head[2] >> 1 & 1)


_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_FORMATS: dict[bytes, Callable[[Bytes], bool]] = {
    b"OggS": _ogg,
    b".snd": partial(_au, order="big"),
    b"dns.": partial(_au, order="little"),
    b"NIST_1A": _nist,
    b"\x1a\x45\xdf\xa3": _webm,
    **{
        magic: partial(_chunked, layout=layout)
        for magic, layout in {
            b"RIFF": _Chunks(b"data", "little"),
            b"RF64": _Chunks(b"data", "little"),
            b"BW64": _Chunks(b"data", "little"),
            b"RIFX": _Chunks(b"data", "big"),
            b"FORM": _Chunks(b"SSND", "big"),
            b"caff": _Chunks(b"data", "big", first=8, size=8, pad=1, is_one=False),
            b"riff": _Chunks(b"data" + _GUID, "little", first=40, size=8, pad=8, counts_itself=True),
        }.items()
    },
}
