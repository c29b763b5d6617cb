"""LLaMA's SentencePiece model as a tokenizer that needs no SentencePiece.

Built here piece by piece, because what a version of transformers makes of `tokenizer.model` is not what transformers
4.33 read with it: 5.x puts no space before a text that begins with one. Whatever is built is compared with
SentencePiece itself before it is used.
"""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

FILE = "tokenizer.model"
_SPACE = "▁"
_PROBES = (
    "Today is a sunny day.",
    " two  spaces,   three, and one behind ",
    ": what?\n\n- 1234567890\t100 % <s></s><unk>",
    "ﬁne ½ Ａ é \u00a0 \u200b \u3000",
    "▁ ▁▁a▁",
    "日本語 🙂 \x01",
    "aaaaaaaaaaa ----------- ===  ......",
)
"""Where tokenizers differ: spaces, digits, compatibility letters, letters that are spelt in bytes, repeats."""


class SentencePieceError(ValueError):
    """A tokenizer.model that is damaged, or not of LLaMA's kind."""


def read(directory: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `directory/tokenizer.model`, without any added token.

    It reads each text as transformers 4.33's slow LLaMA tokenizer reads a stretch between two added tokens: with one
    space put before it. Raises FileNotFoundError, or SentencePieceError for a file that is not a byte-fallback BPE
    model as LLaMA's is.
    """
    file = Path(directory, FILE)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(file.read_bytes())
    except RuntimeError:
        raise SentencePieceError(f"{file}: not a SentencePiece model, or damaged: fetch it again") from None
    tokenizer = _build(pieces)
    whole = " ".join(pieces.id_to_piece(list(range(pieces.get_piece_size()))))
    for probe in (*_PROBES, whole.replace(_SPACE, " ")):
        if tokenizer.encode(probe, add_special_tokens=False).ids != pieces.encode(probe):
            raise SentencePieceError(
                f"{file}: not a model of LLaMA's kind (byte-fallback BPE, identity normalisation, a space put before "
                f"each text): SentencePiece reads {probe[:40]!r} otherwise"
            )
    unknown, begin, end = (pieces.id_to_piece(number()) for number in (pieces.unk_id, pieces.bos_id, pieces.eos_id))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )


def _build(pieces: SentencePieceProcessor) -> Tokenizer:
    size = pieces.get_piece_size()
    names = pieces.id_to_piece(list(range(size)))
    ordinary = {
        name: number
        for number, name in enumerate(names)
        if not (pieces.is_unknown(number) or pieces.is_control(number) or pieces.is_byte(number))
    }
    # SentencePiece joins whatever two neighbours make the piece of the highest score; a list of joins in the order of
    # the scores, each piece at every place where it can be cut into two pieces, does the same.
    joins = [
        (piece[:cut], piece[cut:])
        for piece in sorted(ordinary, key=lambda piece: (-pieces.get_score(ordinary[piece]), ordinary[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=joins,
            unk_token=pieces.id_to_piece(pieces.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = pieces.id_to_piece(pieces.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, pieces.bos_id())]
    )
    return tokenizer
