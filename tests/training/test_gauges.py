import math

import numpy as np
import pytest
import torch

from speechgpt.training.gauges import Gauges, peak_flops
from speechgpt.training.shape import Products

CPU = torch.device("cpu")


def test_use_of_the_hardware_is_operations_over_all_workers_peak():
    gauges = Gauges(Products(1000, 1000, 100, 100), 1e6, 2, np.full(8, 10), 4, CPU)
    read = gauges.read({"step": 2, "tokens_per_second": 50.0, "targets_per_second": 20.0, "loss_text": 2.0})
    # Six operations a weight and token; the head sees targets alone.
    assert read["mfu"] == pytest.approx((6 * 1000 * 50 + 6 * 100 * 20) / 2e6)
    assert (read["blocks_seen"], read["tokens_seen"]) == (8, 80)
    assert read["perplexity_text"] == pytest.approx(math.e**2)
    assert "perplexity_units" not in read
    assert read["memory_peak_gib"] > 0.1


def test_a_peak_that_is_not_known_is_not_made_up():
    gauges = Gauges(Products(1000, 1000, 100, 100), None, 1, np.full(8, 10), 4, CPU)
    assert "mfu" not in gauges.read({"step": 1, "tokens_per_second": 50.0, "targets_per_second": 20.0})


def test_before_the_first_step_nothing_was_seen():
    gauges = Gauges(Products(1, 1, 1, 1), None, 1, np.full(8, 10), 4, CPU)
    assert "tokens_seen" not in gauges.read({"step": 0, "validation_loss": 1.0})


def test_a_cpu_is_measured_and_no_random_number_drawn():
    before = torch.get_rng_state()
    peak = peak_flops(CPU, torch.float32)
    assert peak is not None and 1e8 < peak < 1e14
    assert torch.equal(before, torch.get_rng_state())


def test_frozen_weights_have_no_gradient_of_their_own():
    frozen, learnt = Products(100, 0, 0, 0), Products(100, 100, 0, 0)
    assert (frozen.flops(1, 0), learnt.flops(1, 0)) == (400, 600)
