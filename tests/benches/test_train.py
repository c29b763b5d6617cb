"""What `bench train` is made of, and one small run of it."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from speechgpt.benches import rows, train
from speechgpt.benches.command import app
from speechgpt.benches.padded_trainer import Rows
from speechgpt.benches.turns import Program
from speechgpt.interop.benches.baseline import BenchError
from speechgpt.training.blocks import Blocks


def test_cross_modal_rows_are_of_clips_of_1_to_17_seconds():
    drawn = rows.draw("crossmodal", 4000, 1856, seed=1)
    lengths = np.array([len(ids) for ids, _ in drawn.rows])
    assert lengths.min() == pytest.approx(100 + 20 + 32.5, abs=2)
    assert lengths.max() == drawn.block == 512
    assert 0 < drawn.cut <= (lengths == 512).sum()
    seconds = (lengths[lengths < 512] - 120) / 32.5
    assert np.median(seconds) == pytest.approx(3.6, abs=0.4), "evenly in the logarithm, long ones cut"
    again = rows.draw("crossmodal", 4000, 1856, seed=1)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(drawn.rows, again.rows, strict=True))


def test_chain_rows_have_250_to_400_tokens_after_the_prefix():
    drawn = rows.draw("chain", 2000, 1856, seed=1)
    lengths = {len(ids) - rows.PREFIX for ids, _ in drawn.rows}
    assert (min(lengths), max(lengths), drawn.cut) == (250, 400, 0)
    assert all((weights[: rows.PREFIX] == 0).all() and weights[rows.PREFIX :].all() for _, weights in drawn.rows)


@pytest.fixture
def small(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    monkeypatch.setattr(train, "SHAPE", train.SHAPE | shape | {"num_attention_heads": 2, "num_key_value_heads": 2})


def test_all_sides_are_given_the_same_rows(small, tmp_path):
    drawn, block, fill = train.prepare(train.Settings(rounds=1, steps=2, accumulation=1, workers=2), 0, tmp_path)
    blocks, padded = Blocks(tmp_path / "blocks.arrow"), Rows(tmp_path / "rows.npz")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(padded) == len(drawn.rows)
    # A turn to warm up, one that is measured, one that is profiled.
    assert len(blocks) == 3 * 2 * 2 and plan["stage"]["steps"] == 6
    assert blocks.tokens.sum() == pytest.approx(fill * len(blocks) * block)
    assert fill > 0.95
    rows_packed = sum(int((positions == 0).sum()) for positions in blocks.read(range(len(blocks))).positions)
    # Padding begins at position 0 like a row.
    rows_packed -= int((blocks.tokens < block).sum())
    assert rows_packed / (6 * 2) == pytest.approx(plan["rows_a_batch"], rel=0.2), (
        "a step of each side sees as many rows"
    )
    for number in (0, 7, len(padded) - 1):
        ids, weights = drawn.rows[number]
        item = padded[number]
        assert item["input_ids"] == ids.tolist()
        assert item["labels"] == np.where(weights > 0, ids, -100).tolist()


def test_turns_are_told_apart_and_the_slowest_rank_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    (tmp_path / "side.py").write_text(
        "import os, time\n"
        "from speechgpt.benches.turns import Turns\n"
        "turns, rank = Turns(), int(os.environ['RANK'])\n"
        "print('this is no answer')\n"
        "for turn in range(3):\n"
        "    turns.begin()\n"
        "    time.sleep(0.3 * rank)\n"
        "    turns.end(turn=turn)\n"
        "raise SystemExit('out of work')\n"
    )
    with Program("side", tmp_path, workers=2, threads=1) as program:
        for turn in range(3):
            answer = program.turn()
            assert answer["turn"] == turn
            assert answer["wall"] >= 0.3 and answer["processor"] < 0.2
        with pytest.raises(BenchError, match="out of work"):
            program.turn()


@pytest.mark.evidence
def test_the_three_sides_train_and_are_told_with_profile_and_floor():
    done = CliRunner().invoke(app, ["train", "--rounds", "2", "--accumulation", "2", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    conditions = result["conditions"]
    assert result["ratio"] == pytest.approx(result["figure"] / result["baseline"], rel=0.01)
    assert result["ratio"] > 0.9
    assert conditions["trainer"]["ratio"] > 1.3
    assert conditions["trainer"]["fill"] < conditions["block_fill"]
    assert 0 < conditions["floor"]["seconds_a_token"] < conditions["floor"]["taken"]["our_loop"]
    for shares in conditions["profile"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=0.02)
