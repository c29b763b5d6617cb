import numpy as np
import pytest

from speechgpt.training.blocks import Blocks, table, write
from speechgpt.training.packing import pack


def packed(number: int):
    return pack([(np.full(3 + number, number), np.ones(3 + number))], 16, pad_id=0)


def test_blocks_are_read_by_index_whatever_order_they_were_written_in(tmp_path):
    parts = [table([4, 1], [packed(4), packed(1)]), table([0, 3, 2], [packed(0), packed(3), packed(2)])]
    write(tmp_path / "blocks.arrow", parts, 16)
    blocks = Blocks(tmp_path / "blocks.arrow")
    assert len(blocks) == 5
    batch = blocks.read([3, 0])
    assert batch.ids[:, 0].tolist() == [3, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, *range(10)]
    assert blocks.tokens.tolist() == [3, 4, 5, 6, 7]
    assert blocks.weight.tolist() == [2, 3, 4, 5, 6]


def test_a_missing_or_repeated_block_is_an_error(tmp_path):
    for name, indices in (("missing", [0, 2]), ("repeated", [0, 0])):
        write(tmp_path / name, [table(indices, [packed(1), packed(2)])], 16)
        with pytest.raises(ValueError, match="each once"):
            Blocks(tmp_path / name)


def test_an_interrupted_write_leaves_no_file(tmp_path):
    def broken():
        yield table([0], [packed(1)])
        raise OSError("the stream ended")

    with pytest.raises(OSError, match="the stream ended"):
        write(tmp_path / "blocks.arrow", broken(), 16)
    assert not (tmp_path / "blocks.arrow").exists()
