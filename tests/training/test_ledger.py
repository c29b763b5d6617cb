import pytest
import torch

from speechgpt.training import engine
from speechgpt.training.config import EngineSection
from speechgpt.training.ledger import Ledger

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_group():
    engine.join(EngineSection(workers=1))


def test_blocks_read_once_in_any_order_by_any_ranks_settle():
    first, second, after = Ledger(), Ledger(), Ledger()
    first.add([4, 0, 3])
    second.add(range(1, 3))
    after.take_over([first.state(), second.state()])
    after.add([5])
    assert after.settle(range(6), CPU) == 6


@pytest.mark.parametrize("read", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, 3, 3], [0, 0, 3, 3]])
def test_a_block_skipped_or_read_twice_is_told(read):
    ledger = Ledger()
    ledger.add(read)
    with pytest.raises(RuntimeError, match=f"{len(read)} blocks were read where 4 should"):
        ledger.settle(range(4), CPU)
