"""Packed blocks on a node's disk: written once as they stream in, read by index through a memory map."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from speechgpt.training.packing import Block


def schema(block: int) -> pa.Schema:
    """Arrow schema of blocks of `block` tokens; `index` is the block's place in the whole stage."""
    return pa.schema(
        {
            "index": pa.int64(),
            "ids": pa.list_(pa.int32(), block),
            "weights": pa.list_(pa.float32(), block),
            "positions": pa.list_(pa.int32(), block),
            "tokens": pa.int32(),
            "weight": pa.float64(),
        }
    )


def table(indices: Sequence[int], packed: Sequence[Block]) -> pa.Table:
    """Blocks and their indices as an Arrow table of `schema`."""
    block = len(packed[0].ids)
    columns = {
        name: pa.FixedSizeListArray.from_arrays(np.concatenate([getattr(b, name) for b in packed]), block)
        for name in ("ids", "weights", "positions")
    }
    columns["index"] = pa.array(indices, pa.int64())
    columns["tokens"] = pa.array([b.tokens for b in packed], pa.int32())
    columns["weight"] = pa.array([float(b.weights.sum(dtype=np.float64)) for b in packed], pa.float64())
    return pa.table({field.name: columns[field.name] for field in schema(block)}, schema=schema(block))


def write(path: Path, batches: Iterable[pa.Table], block: int) -> None:
    """Write blocks, in whatever order they come, to an Arrow file that appears under its name only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema(block)) as writer:
        for batch in batches:
            writer.write_table(batch.cast(schema(block)))
    partial.replace(path)


class Batch(NamedTuple):
    """Blocks as tensors; every tensor is [blocks, block]."""

    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Blocks:
    """The blocks of a stage, by index; memory holds only the pages that are being read."""

    def __init__(self, path: Path) -> None:
        source = pa.memory_map(str(path))
        reader = pa.ipc.open_file(source)
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        index = np.concatenate([batch["index"].to_numpy() for batch in self._batches])
        if len(index) != len(np.unique(index)) or index.min() != 0 or index.max() != len(index) - 1:
            raise ValueError(f"{path}: block indices are not 0..{len(index) - 1}, each once")
        batch_of = np.repeat(np.arange(len(self._batches)), [batch.num_rows for batch in self._batches])
        place_of = np.concatenate([np.arange(batch.num_rows) for batch in self._batches])
        order = np.argsort(index)
        self._batch_of, self._place_of = batch_of[order], place_of[order]
        self.tokens = np.concatenate([batch["tokens"].to_numpy() for batch in self._batches])[order]
        """Tokens that are not padding, [blocks]."""
        self.weight = np.concatenate([batch["weight"].to_numpy() for batch in self._batches])[order]
        """Sum of the loss weights, [blocks]."""

    def __len__(self) -> int:
        return len(self._batch_of)

    def read(self, indices: Sequence[int]) -> Batch:
        """Copy the blocks of these indices out of the map."""

        def column(name: str) -> torch.Tensor:
            rows = [
                self._batches[self._batch_of[index]][name][int(self._place_of[index])].values.to_numpy()
                for index in indices
            ]
            return torch.from_numpy(np.stack(rows))

        return Batch(column("ids").long(), column("weights"), column("positions").long())
