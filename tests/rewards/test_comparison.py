"""Win rates worked by hand, from judges that agree with themselves, contradict themselves, and fail."""

import asyncio

import pytest
import torch

from rewards import Clip, Reward, RewardError, Scores, lift, win_rate


def clips(*levels, group=0, prompt="a lamp"):
    return [Clip(torch.full((2, 3, 4, 4), level), prompt, group=group) for level in levels]


def level(clip):
    return clip.video.mean().item()


def brighter(first, second):
    return 0.5 if level(first) == level(second) else float(level(first) > level(second))


def test_rate_is_the_mean_over_opponents():
    reward = win_rate(brighter)
    found = reward(clips(0.1, 0.9, 0.5, 0.5))
    assert (reward.scope, reward.differentiable, reward.name) == ("group", False, "win_rate")
    assert found.total.tolist() == pytest.approx([0, 1, 0.5, 0.5])
    assert found.dims == {}


def test_groups_compete_among_themselves():
    mixed = [clips(0.9)[0], clips(0.1, group=7, prompt="b")[0], clips(0.8)[0], clips(0.2, group=7, prompt="b")[0]]
    assert win_rate(brighter)(mixed).total.tolist() == [1, 0, 0, 1]


def test_every_pair_once_in_each_order():
    asked = []

    def judge(first, second):
        asked.append((round(level(first), 1), round(level(second), 1)))
        return 0.5

    win_rate(judge)(clips(0.1, 0.2, 0.3))
    assert sorted(asked) == [(a, b) for a in (0.1, 0.2, 0.3) for b in (0.1, 0.2, 0.3) if a != b]
    asked.clear()
    win_rate(judge, swap=False)(clips(0.1, 0.2, 0.3))
    assert asked == [(0.1, 0.2), (0.1, 0.3), (0.2, 0.3)]


@pytest.mark.parametrize(
    ("there", "back", "expected"),
    [
        (1.0, 0.0, 1.0),  # both orders name the first clip
        (0.0, 1.0, 0.0),
        (1.0, 1.0, 0.5),  # each names the one it saw first
        (0.0, 0.0, 0.5),
        (1.0, 0.5, 0.5),  # one says a tie
        (0.5, 0.5, 0.5),
        (0.9, 0.3, 0.8),  # 0.9 and 0.7 for the first clip
        (0.9, 0.6, 0.5),  # 0.9 and 0.4
    ],
)
def test_two_orders_make_one_verdict(there, back, expected):
    found = win_rate(lambda first, second: there if level(first) < level(second) else back)(clips(0.1, 0.9))
    assert found.total.tolist() == pytest.approx([expected, 1 - expected])


def test_a_failed_comparison_is_left_out():
    def judge(first, second):
        if {round(level(first), 1), round(level(second), 1)} == {0.1, 0.9}:
            return None
        return brighter(first, second)

    assert win_rate(judge)(clips(0.1, 0.5, 0.9)).total.tolist() == [0, 0.5, 1]


def test_a_clip_without_a_comparison_is_invalid():
    def judge(first, second):
        return float("nan") if level(second) < 0.1 else brighter(first, second)  # fails in one order only

    found = win_rate(judge)(clips(0.05, 0.5, 0.9))
    assert found.valid.tolist() == [False, True, True]
    assert found.total[1:].tolist() == [0, 1]
    assert not win_rate(lambda first, second: None)(clips(0.1, 0.5)).valid.any()


def test_dimensions_have_rates_of_their_own():
    def judge(first, second):
        return {"overall": brighter(first, second), "dark": 1 - brighter(first, second), "biased": 1}

    found = win_rate(judge)(clips(0.1, 0.5, 0.9))
    assert found.total.tolist() == [0, 0.5, 1]
    assert {name: values.tolist() for name, values in found.dims.items()} == {
        "overall": [0, 0.5, 1],
        "dark": [1, 0.5, 0],
        "biased": [0.5] * 3,
    }


def test_asynchronous_comparisons_run_side_by_side():
    waiting, all_there = [0], asyncio.Event()

    async def judge(first, second):
        waiting[0] += 1
        if waiting[0] == 12:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), 20)  # ends only if the other eleven are asked meanwhile
        return brighter(first, second)

    assert win_rate(judge)(clips(0.1, 0.5, 0.9, 0.2)).total.tolist() == pytest.approx([0, 2 / 3, 1, 1 / 3])


class Bright(Reward):
    name = "bright"

    def __init__(self, failing=()):
        self.failing, self.calls = failing, 0

    def indices(self, length, fps):
        return [0]

    def score(self, clips):
        self.calls += 1
        total = torch.tensor([level(clip) for clip in clips])
        valid = torch.tensor([round(level(clip), 1) not in self.failing for clip in clips])
        return Scores(total, {"dark": 1 - total}, valid=valid)


class SlowBright(Bright):
    async def score(self, clips):
        await asyncio.sleep(0)
        return super().score(clips)


@pytest.mark.parametrize("kind", [Bright, SlowBright])
def test_a_reward_is_called_once_and_ranked(kind):
    inner = kind()
    reward = win_rate(inner)
    assert (reward.scope, reward.is_async) == ("group", kind is SlowBright)
    found = reward(clips(0.1, 0.9, 0.5, 0.5))
    assert found.total.tolist() == pytest.approx([0, 1, 0.5, 0.5])
    assert found.dims["dark"].tolist() == pytest.approx([1, 0, 0.5, 0.5])
    assert inner.calls == 1
    assert reward.indices(7, 16.0) == [0]


def test_clips_that_the_reward_fails_on_neither_win_nor_lose():
    found = win_rate(Bright(failing={0.9}))(clips(0.1, 0.9, 0.5))
    assert found.valid.tolist() == [True, False, True]
    assert found.total[[0, 2]].tolist() == [0, 1]
    assert found.dims["dark"][[0, 2]].tolist() == [1, 0]


def test_a_lifted_function_can_be_ranked():
    reward = win_rate(lift(lambda videos, prompts: videos.mean((1, 2, 3, 4))))
    assert reward(torch.stack([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]), ["x", "x"]).total.tolist() == [0, 1]


@pytest.mark.parametrize("judge", [brighter, Bright()])
def test_a_group_of_one_and_a_group_of_two_prompts_are_named(judge):
    with pytest.raises(RewardError, match=r"reward win_rate: group 3 \('a lamp'\) has one clip"):
        win_rate(judge)([*clips(0.1, 0.2), *clips(0.5, group=3)])
    with pytest.raises(RewardError, match="group 0 holds clips of 2 prompts"):
        win_rate(judge)([*clips(0.1), *clips(0.5, prompt="a door")])


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (2.0, r"returned 2.0, outside 0 to 1"),
        (-0.1, "outside 0 to 1"),
        ("Video 1", "returned 'Video 1', expected numbers or None"),
        ({"motion": 1.0}, "without overall"),
    ],
)
def test_an_impossible_verdict_is_named(verdict, message):
    with pytest.raises(RewardError, match=f"reward win_rate: the judge .*{message}"):
        win_rate(lambda first, second: verdict)(clips(0.1, 0.9))
