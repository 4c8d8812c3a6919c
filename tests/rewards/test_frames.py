"""Video from frames: every choice and every weight rule by hand."""

import asyncio
import math
from itertools import pairwise

import pytest
import torch

from rewards import Clip, Reward, RewardError, Scores, answers, lift, per_frame
from rewards.frames import frame_indices, segment_indices


def level(videos, prompts):
    """What the first pixel of a one-frame clip holds."""
    assert videos.shape[1] == 1
    return videos[:, 0, 0, 0, 0]


LEVEL = lift(level, differentiable=True)


def clip(*levels, prompt="a"):
    """A clip of which frame i has brightness levels[i]."""
    return Clip(torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 6).contiguous(), prompt, fps=8.0)


def noise(length, seed=0, size=(40, 48)):
    return torch.rand(length, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("length", "frames", "expected"),
    [(9, 3, [0, 4, 8]), (4, 8, [0, 1, 2, 3]), (5, 1, [0]), (3, None, [0, 1, 2]), (1, 4, [0]), (6, 4, [0, 2, 3, 5])],
)
def test_frames_are_evenly_spaced(length, frames, expected):
    assert frame_indices(length, frames) == expected


@pytest.mark.parametrize(
    ("select", "expected"), [("uniform", [0.1, 0.5, 0.9]), ("first", [0.1]), ("all", [0.1, 0.2, 0.5, 0.3, 0.9])]
)
def test_dense_holds_the_chosen_frames(select, expected):
    found = per_frame(LEVEL, 3, select)([clip(0.1, 0.2, 0.5, 0.3, 0.9)])
    torch.testing.assert_close(found.dense, torch.tensor([expected]))
    torch.testing.assert_close(found.total, torch.tensor([sum(expected) / len(expected)]))


E1, E2, E3 = math.exp(-1.0), math.exp(-2.0), math.exp(-3.0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("mean", (0.1 + 0.2 + 0.5 + 0.3 + 0.9 + 0.4) / 6),
        ("best", 0.9),  # 30 % of 6 frames is 1.8, so one
        ({"best": 0.5}, (0.9 + 0.5 + 0.4) / 3),
        ({"best": 1}, (0.1 + 0.2 + 0.5 + 0.3 + 0.9 + 0.4) / 6),
        ({"best": 0.01}, 0.9),
        # frames 0 to 5 of 6 are 3, 2, 1, 0, 1, 2 from the middle, frame 3
        ("attenuated", (0.1 * E3 + 0.2 * E2 + 0.5 * E1 + 0.3 + 0.9 * E1 + 0.4 * E2) / 6),
        ({"attenuated": 0}, (0.1 + 0.2 + 0.5 + 0.3 + 0.9 + 0.4) / 6),
        ("attenuated_mean", (0.1 * E3 + 0.2 * E2 + 0.5 * E1 + 0.3 + 0.9 * E1 + 0.4 * E2) / (E3 + 2 * E2 + 2 * E1 + 1)),
        ({"attenuated_mean": 0}, (0.1 + 0.2 + 0.5 + 0.3 + 0.9 + 0.4) / 6),
        ({"attenuated_mean": 2000.0}, 0.3),  # only the frame in the middle is left
    ],
)
def test_weights_by_hand(weights, expected):
    found = per_frame(LEVEL, None, "all", weights)([clip(0.1, 0.2, 0.5, 0.3, 0.9, 0.4)])
    assert found.total.tolist() == pytest.approx([expected], abs=1e-6)
    torch.testing.assert_close(found.dense, torch.tensor([[0.1, 0.2, 0.5, 0.3, 0.9, 0.4]]))


def test_attenuation_counts_frames_of_the_clip_and_not_of_the_choice():
    # Frames 0, 4 and 8 of 9 are 4, 0 and 4 from the middle.
    found = per_frame(LEVEL, 3, "uniform", {"attenuated": 0.5})([clip(0.6, *[0.0] * 3, 0.3, *[0.0] * 3, 0.9)])
    assert found.total.item() == pytest.approx((0.6 * E2 + 0.3 + 0.9 * E2) / 3, abs=1e-6)


def test_the_published_setting_of_instructvideo():
    # 16 frames, 4 segments, decay 1: whatever is drawn, the total is what the drawn frames say.
    video = noise(16)
    found = per_frame(LEVEL, 4, "segment", "attenuated")([Clip(video, "a")])
    drawn = segment_indices(video, 4, seed=0)
    expected = sum(math.exp(-abs(g - 8)) * video[g, 0, 0, 0].item() for g in drawn) / 4
    assert found.total.item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found.dense[0], video[drawn, 0, 0, 0])


@pytest.mark.parametrize(("length", "segments", "span"), [(16, 4, 4), (18, 4, 4), (5, 5, 1), (3, 8, 1), (1, 2, 1)])
def test_every_segment_gives_one_frame(length, segments, span):
    for seed in range(20):
        drawn = segment_indices(noise(length, seed), segments, seed)
        assert [index // span for index in drawn] == list(range(min(segments, length)))


def test_draws_are_uniform_and_independent():
    draws = torch.tensor([segment_indices(noise(12, seed), 3, 0) for seed in range(1200)]) % 4  # (1200, 3)
    for row in range(3):
        assert torch.bincount(draws[:, row], minlength=4).float().sub(300).abs().max() < 75  # five standard deviations
    for first, second in pairwise(range(3)):
        pairs = torch.bincount(draws[:, first] * 4 + draws[:, second], minlength=16).float()
        assert pairs.sub(75).abs().max() < 42


def test_the_draw_is_a_function_of_seed_and_pixels():
    video = noise(16)
    drawn = segment_indices(video, 4, 0)
    assert segment_indices(video.clone(), 4, 0) == drawn
    assert segment_indices((video * 255).round() / 255, 4, 0) == drawn  # also after a transport in bytes
    assert len({tuple(segment_indices(video, 4, seed)) for seed in range(20)}) > 10
    assert len({tuple(segment_indices(noise(16, seed), 4, 0)) for seed in range(20)}) > 10
    ramp = torch.arange(16 * 3 * 4 * 6).view(16, 3, 4, 6) / (16 * 3 * 4 * 6)
    assert segment_indices(ramp, 4, 0) == [2, 6, 11, 13]  # the same in every process and on every machine


def test_the_draw_does_not_depend_on_the_rest_of_the_call_or_on_the_prompt():
    reward = per_frame(LEVEL, 4, "segment")
    alone = [reward([Clip(noise(16, seed), "a")]).dense for seed in range(3)]
    together = reward([Clip(noise(16, seed), "b") for seed in range(3)]).dense
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": 3}, [0, 4, 8]),
        ({"select": "first"}, [0]),
        ({"frames": 3, "weights": "best"}, [0, 4, 8]),
        ({"frames": None}, list(range(9))),
        ({"frames": 3, "select": "segment"}, list(range(9))),
        ({"frames": 3, "weights": "attenuated"}, list(range(9))),
        ({"select": "first", "weights": "attenuated_mean"}, list(range(9))),
    ],
)
def test_indices_are_the_frames_that_matter(options, expected):
    assert per_frame(LEVEL, **options).indices(9, 8.0) == expected


class Recorder(Reward):
    """Notes what it is called with."""

    name, differentiable = "recorder", False

    def __init__(self):
        self.calls = []

    def score(self, clips):
        self.calls.append(clips)
        level = torch.stack([clip.video.mean() for clip in clips])
        return Scores(level, {"twice": 2 * level})


def test_the_image_reward_sees_all_frames_in_one_call():
    recorder = Recorder()
    found = per_frame(recorder, 2, weights={"best": 0.5})([clip(0.1, 0.5, 0.2, prompt="a"), clip(0.4, 0.3, prompt="b")])
    (frames,) = recorder.calls
    assert [frame.video.shape for frame in frames] == [(1, 3, 4, 6)] * 4
    assert [(round(frame.video.mean().item(), 3), frame.prompt) for frame in frames] == [
        (0.1, "a"),
        (0.2, "a"),
        (0.4, "b"),
        (0.3, "b"),
    ]
    assert [frame.fps for frame in frames] == pytest.approx([8 / 3, 8 / 3, 4, 4])  # a frame lasts as long as its clip
    torch.testing.assert_close(found.total, torch.tensor([0.2, 0.4]))
    torch.testing.assert_close(found.dims["twice"], torch.tensor([0.4, 0.8]))


def test_dense_is_none_where_clips_differ_in_scored_frames():
    found = per_frame(LEVEL, 4)([clip(0.1, 0.5), clip(0.2, 0.4, 0.9)])
    assert found.dense is None
    torch.testing.assert_close(found.total, torch.tensor([0.3, 0.5]))


@pytest.mark.parametrize("weights", ["mean", "best", "attenuated", "attenuated_mean"])
def test_a_frame_that_could_not_be_judged_makes_its_clip_invalid(weights):
    def picky(videos, prompts):
        return torch.where(level(videos, prompts) > 0.8, torch.nan, level(videos, prompts))

    found = per_frame(picky, weights=weights)([clip(0.1, 0.9, 0.2), clip(0.1, 0.3, 0.2)])
    assert found.valid.tolist() == [False, True]
    assert found.total.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("mean", [1 / 4] * 4),
        ({"best": 0.5}, [0, 1 / 2, 0, 1 / 2]),
        ("attenuated", [E2 / 4, E1 / 4, 1 / 4, E1 / 4]),
        ("attenuated_mean", [w / (E2 + 2 * E1 + 1) for w in (E2, E1, 1, E1)]),
    ],
)
def test_the_gradient_of_a_frame_is_its_weight(weights, expected):
    shown = clip(0.1, 0.5, 0.2, 0.9)
    shown.video.requires_grad_()
    reward = per_frame(LEVEL, weights=weights)
    assert reward.differentiable
    reward([shown]).total.sum().backward()
    torch.testing.assert_close(shown.video.grad[:, 0, 0, 0], torch.tensor(expected))
    assert shown.video.grad[:, 1:].abs().max() == 0


def test_an_image_reward_without_gradients_gives_one_without():
    shown = clip(0.1, 0.5)
    shown.video.requires_grad_()
    assert not per_frame(level)([shown]).total.requires_grad


def test_an_asynchronous_image_reward_is_awaited_beside_others():
    arrived = []

    class Waits(Recorder):
        async def score(self, clips):
            arrived.append(self)
            while len(arrived) < 2:  # ends only if the other one runs meanwhile
                await asyncio.sleep(0.001)
            return Scores(torch.stack([clip.video.mean() for clip in clips]))

    rewards = {name: per_frame(Waits(), weights="best") for name in "ab"}
    found = answers(rewards, [clip(0.1, 0.5)])
    assert [found[name].total.item() for name in "ab"] == pytest.approx([0.5, 0.5])
    torch.testing.assert_close(rewards["a"]([clip(0.1, 0.5)]).dense, torch.tensor([[0.1, 0.5]]))


def test_name_is_the_image_rewards_or_another():
    assert per_frame(LEVEL).name == "level"
    assert per_frame(LEVEL, name="other").name == "other"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"frames": 2.5}, "frames is 2.5"),
        ({"select": "random"}, "select is 'random', expected one of uniform, segment, first, all"),
        ({"frames": None, "select": "segment"}, "how many segments"),
        ({"weights": "median"}, "weights is 'median', expected one of mean, best"),
        ({"weights": {}}, "weights is {}"),
        ({"weights": {"mean": 1}}, "weights is {'mean': 1}"),
        ({"weights": {"best": 0.3, "attenuated": 1}}, "weights is "),
        ({"weights": {"best": 1.5}}, "share of best frames is 1.5"),
        ({"weights": {"best": 0}}, "share of best frames is 0"),
        ({"weights": {"attenuated": -1}}, "attenuated is -1"),
        ({"weights": {"attenuated": math.nan}}, "attenuated is nan"),
        ({"weights": {"attenuated": "1"}}, "attenuated is '1'"),
    ],
)
def test_options_are_checked_in_one_line(options, message):
    with pytest.raises(RewardError, match=message) as caught:
        per_frame(LEVEL, **options)
    assert str(caught.value).startswith("reward level: ")
    assert "\n" not in str(caught.value)


def test_a_reward_that_compares_clips_has_no_single_frames():
    class Group(Recorder):
        scope = "group"

    with pytest.raises(RewardError, match="scope 'group'"):
        per_frame(Group())
