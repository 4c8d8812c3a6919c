"""Which steps add noise and which are trained: sliding, shrinking, random and per-prompt windows."""

import pytest

from alignment.windows import Window, check_window, plan_steps, window_start

ALLOWED = list(range(2, 22))  # 20 steps of a longer rollout


def stochastic(window, iteration, position=0, trained=None, seed=0):
    return plan_steps(window, ALLOWED, trained, seed, iteration, position).stochastic


def test_without_a_size_all_steps_add_noise():
    plan = plan_steps(Window(), ALLOWED, None, 0, 5, 3)
    assert plan.stochastic == plan.recorded == tuple(ALLOWED)


def test_progressive_window_follows_its_formula():
    """l(m) = min(floor(m / tau) s, T - w) with m iterations done."""
    for every, stride, size in ((25, 1, 4), (3, 2, 5), (1, 7, 20)):
        window = Window(size=size, every=every, stride=stride)
        for iteration in range(1, 700, 7):
            expected = min((iteration - 1) // every * stride, 20 - size)
            assert window_start(window, 20, iteration) == expected
            assert stochastic(window, iteration) == tuple(ALLOWED[expected : expected + size])


def test_decaying_window_stays_ever_shorter():
    """every exp(-k max(0, l - from)) iterations at start l, rounded: from 10 at start 0 with k = .5 from 2 on."""
    window = Window(size=4, move="decay", every=10, decay=0.5, decay_from=2)
    starts = [window_start(window, 20, iteration) for iteration in range(1, 61)]
    stays = [starts.count(start) for start in range(8)]
    assert stays == [10, 10, 10, 6, 4, 2, 1, 1]  # 10 e^-.5 = 6.07, e^-1: 3.68, 2.23, 1.35, .82
    assert starts[-1] == 16


def test_frozen_window_is_the_first():
    assert stochastic(Window(size=3, move="frozen"), 900) == (2, 3, 4)


def test_random_windows():
    """Every start comes, the same for a group in every process; prompts differ only if they are to."""
    window = Window(size=2, move="random")
    drawn = [stochastic(window, iteration) for iteration in range(1, 400)]
    assert {steps[0] for steps in drawn} == set(range(2, 21))
    assert all(second == first + 1 for first, second in drawn)
    assert stochastic(window, 7, position=3) == stochastic(window, 7, position=4)
    own = Window(size=1, move="random", per_prompt=True)
    assert len({stochastic(own, 7, position) for position in range(60)}) > 10
    assert stochastic(own, 7, 3) == stochastic(own, 7, 3)
    assert {stochastic(own, i, 3) for i in range(60)} != {stochastic(own, i, 3, seed=1) for i in range(5)}


@pytest.mark.parametrize("window", [Window(), Window(size=6), Window(size=6, move="random", per_prompt=True)])
def test_trained_steps(window):
    """A sorted draw of the stochastic ones, anew every iteration, and every one of them in the long run."""
    plans = [plan_steps(window, ALLOWED, 3, 0, iteration, 0) for iteration in range(1, 200)]
    for plan in plans:
        assert len(plan.recorded) == 3
        assert set(plan.recorded) <= set(plan.stochastic)
        assert list(plan.recorded) == sorted(plan.recorded)
    assert {step for plan in plans for step in plan.recorded} == {step for plan in plans for step in plan.stochastic}
    assert len({plan.recorded for plan in plans}) > 50
    whole = plan_steps(window, ALLOWED, 20, 0, 1, 0)
    assert whole.recorded == whole.stochastic


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"size": 20}, None),
        ({"size": 1, "move": "random", "per_prompt": True}, None),
        ({"size": 21}, "algorithm.window.size"),
        ({"size": 0}, "algorithm.window.size"),
        ({"size": 2, "move": "sideways"}, "algorithm.window.move"),
        ({"size": 2, "every": 0}, "algorithm.window: every"),
        ({"size": 2, "stride": 0}, "algorithm.window: every"),
        ({"size": 2, "per_prompt": True}, "algorithm.window.per_prompt"),
    ],
)
def test_impossible_windows_are_refused(settings, named):
    lines = check_window(Window(**settings), 20)
    assert lines == [] if named is None else [line.startswith(named) for line in lines] == [True]
