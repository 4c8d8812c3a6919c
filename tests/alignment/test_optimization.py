"""Optimiser, learning-rate schedule, gradient clipping and weight averages."""

import pytest
import torch
from torch import nn

from alignment.config import EMAConfig, OptimizerConfig
from alignment.errors import TrainingStopped
from alignment.optimization import WeightAverage, build_optimizer, clip_gradients, learning_rate


def parameters(*values):
    return {f"p{i}": nn.Parameter(torch.tensor(value)) for i, value in enumerate(values)}


def test_learning_rate_rises_stays_and_falls():
    config = OptimizerConfig(lr=1.0, warmup=4, decay_from=0.5)
    rates = [learning_rate(config, i, 10) for i in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate(OptimizerConfig(lr=2.0), i, 3) for i in (1, 2, 3)] == [2, 2, 2]
    assert learning_rate(OptimizerConfig(lr=1.0, decay_from=0.0), 1, 4) == 1


def test_adamw_takes_its_settings():
    """First step of AdamW: p (1 - lr wd) - lr sign(g)."""
    weights = parameters([2.0, -3.0])
    optimizer = build_optimizer(weights, OptimizerConfig(lr=0.1, weight_decay=0.5, betas=[0.8, 0.9]))
    weights["p0"].grad = torch.tensor([0.3, 7.0])
    optimizer.step()
    expected = [2.0 * 0.95 - 0.1, -3.0 * 0.95 - 0.1]
    assert weights["p0"].tolist() == pytest.approx(expected, rel=1e-6)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_gradients_are_clipped_together():
    weights = parameters([0.0, 0.0], [0.0], [0.0])
    weights["p0"].grad, weights["p1"].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(weights, 1.0) == pytest.approx(5)
    assert weights["p0"].grad.tolist() == pytest.approx([0.6, 0], rel=1e-5)
    assert weights["p1"].grad.tolist() == pytest.approx([0.8], rel=1e-5)
    assert clip_gradients(weights, 10.0) == pytest.approx(1, rel=1e-5)
    assert weights["p1"].grad.tolist() == pytest.approx([0.8], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_stops_the_run(bad):
    weights = parameters([1.0], [2.0])
    weights["p0"].grad, weights["p1"].grad = torch.tensor([1.0]), torch.tensor([bad])
    with pytest.raises(TrainingStopped, match="not finite .first in p1"):
        clip_gradients(weights, 1.0)
    assert [p.item() for p in weights.values()] == [1, 2]


def test_average_follows_its_decay_sequence():
    """decay_n = min((1 + n) / (10 + n), decay): 2/11, 3/12, then 0.3 from n = 3 on (4/13 = 0.308)."""
    weights = parameters([0.0])
    average = WeightAverage(weights, EMAConfig(decay=0.3))
    expected = 0.0
    for decay, value in zip([2 / 11, 3 / 12, 0.3, 0.3], [1.0, 4.0, -2.0, 8.0], strict=True):
        weights["p0"].data.fill_(value)
        average.update()
        expected = decay * expected + (1 - decay) * value
        assert average.weights["p0"].item() == pytest.approx(expected, rel=1e-6)
        assert weights["p0"].item() == value
        assert not average.weights["p0"].requires_grad


def test_average_every_few_updates():
    weights = parameters([0.0])
    average = WeightAverage(weights, EMAConfig(decay=0.9, every=3))
    seen = []
    for value in range(1, 7):
        weights["p0"].data.fill_(float(value))
        average.update()
        seen.append(average.weights["p0"].item())
    third = 3 * (1 - 2 / 11)
    assert seen == pytest.approx([0, 0, third, third, third, third * 3 / 12 + 6 * 9 / 12])
    assert average.updates == 6


def test_no_average_unless_asked_for():
    average = WeightAverage(parameters([1.0]), EMAConfig())
    average.update()
    assert average.weights == {}
    assert average.updates == 1
