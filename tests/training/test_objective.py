import numpy as np
import pytest
import torch
from torch.nn import functional

from speechgpt.training.blocks import Batch
from speechgpt.training.objective import Objective
from speechgpt.training.packing import pack

FIRST_UNIT, UNITS = 40, 20


def row(length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(3, 64, length), rng.choice([0.0, 0.5, 1.0], length).astype(np.float32)


def batch(blocks) -> Batch:
    return Batch(
        *(torch.from_numpy(np.stack([getattr(b, name) for b in blocks])) for name in ("ids", "weights", "positions"))
    )._replace(ids=torch.from_numpy(np.stack([b.ids for b in blocks])).long())


@pytest.mark.parametrize("blocks", [[[11, 7, 20]], [[11, 7, 20], [5, 9, 13, 6]]], ids=["one block", "two blocks"])
def test_packed_rows_have_the_loss_they_have_alone(fresh_model, blocks):
    rows = [[row(length, length) for length in lengths] for lengths in blocks]
    objective = Objective(fresh_model, FIRST_UNIT, UNITS)
    with torch.no_grad():
        together = objective(batch([pack(part, 48, pad_id=0) for part in rows]))
        alone = [objective(batch([pack([one], len(one[0]), pad_id=0)])) for part in rows for one in part]
    for field in together._fields:
        total = sum(getattr(losses, field) for losses in alone)
        assert getattr(together, field).item() == pytest.approx(total.item(), rel=1e-5)
    # The same rows as one text differ, so that the equality above is not for want of attention.
    with torch.no_grad():
        joined = batch([pack(part, 48, pad_id=0) for part in rows])
        leaking = objective(joined._replace(positions=torch.arange(48).expand(len(rows), -1)))
    assert leaking.weighted.item() != pytest.approx(together.weighted.item(), rel=1e-4)


def test_the_loss_is_the_models_own_where_weights_are_one(fresh_model):
    ids, weights = row(30, 1)[0], np.ones(30, dtype=np.float32)
    losses = Objective(fresh_model, FIRST_UNIT, UNITS)(batch([pack([(ids, weights)], 30, pad_id=0)]))
    ids = torch.from_numpy(ids)[None]
    assert losses.weighted.item() / 29 == pytest.approx(fresh_model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_losses_are_split_by_what_is_predicted(fresh_model):
    ids, weights = row(30, 2)
    losses = Objective(fresh_model, FIRST_UNIT, UNITS)(batch([pack([(ids, weights)], 30, pad_id=0)]))
    logits = fresh_model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
    entropy = functional.cross_entropy(logits, torch.from_numpy(ids)[1:], reduction="none").detach().numpy()
    is_unit = (ids[1:] >= FIRST_UNIT) & (ids[1:] < FIRST_UNIT + UNITS)
    learnt = weights[1:] > 0
    assert losses.units.item() == pytest.approx(entropy[is_unit & learnt].sum(), rel=1e-5)
    assert losses.text.item() == pytest.approx(entropy[~is_unit & learnt].sum(), rel=1e-5)
    assert losses.unit_tokens.item() == (is_unit & learnt).sum()
