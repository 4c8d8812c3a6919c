import pytest
import torch

from rewards import Clip, Reward, RewardError, Scores, weighted


class Part:
    """Answers with given numbers, and with the clips' mean pixel added where it is differentiable."""

    def __init__(self, total, dims=None, valid=None, scope="clip", differentiable=False):
        self.name, self.scope, self.differentiable = "part", scope, differentiable
        self.scores = Scores(torch.tensor(total), dims or {}, valid=valid)

    def __call__(self, clips):
        pixel = torch.stack([clip.video.mean() for clip in clips]) if self.differentiable else 0
        return Scores(self.scores.total + pixel, self.scores.dims, valid=self.scores.valid)


def clips(video=None):
    video = torch.zeros(2, 1, 3, 4, 4) if video is None else video
    return [Clip(one, "a") for one in video]


def test_total_is_the_weighted_sum_and_parts_stay_visible():
    parts = {"a": Part([-1.0, 2.0], {"vq": torch.tensor([5.0, 6.0])}), "b": Part([10.0, 20.0])}
    found = weighted(parts, {"a": 2.0, "b": -0.5})(clips())
    assert found.total.tolist() == [2 * -1 - 0.5 * 10, 2 * 2 - 0.5 * 20]
    assert {name: values.tolist() for name, values in found.dims.items()} == {
        "a": [-1, 2],
        "a/vq": [5, 6],
        "b": [10, 20],
    }


def test_experts_without_weights_are_averaged_and_one_that_cannot_judge_masks_the_clip():
    experts = {"appeal": Part([1.0, 2.0]), "smoothness": Part([4.0, float("nan")]), "motion": Part([-2.0, 6.0])}
    found = weighted(experts, name="anime")(clips())
    assert found.total[0].item() == pytest.approx((1 + 4 - 2) / 3)
    assert found.valid.tolist() == [True, False]
    assert found.dims["motion"].tolist() == [-2, 6]  # the others are still shown


def test_one_invalid_part_invalidates_its_clip_only():
    parts = {"a": Part([1.0, 2.0], valid=torch.tensor([True, False])), "b": Part([3.0, 4.0])}
    reward = weighted(parts, {"a": 1.0, "b": 1.0})
    assert reward(clips()).valid.tolist() == [True, False]  # also for a caller that does not go through score
    found = reward(clips())
    assert found.valid.tolist() == [True, False]
    assert found.total[0] == 4
    assert found.total[1].isnan()
    assert found.dims["b"].tolist() == [3, 4]


def test_an_invalid_clip_does_not_poison_the_gradient():
    video = torch.rand(2, 1, 3, 4, 4, requires_grad=True)
    parts = {"a": Part([1.0, float("nan")], differentiable=True), "b": Part([0.0, 0.0], differentiable=True)}
    found = weighted(parts, {"a": 2.0, "b": 1.0})(clips(video))
    found.total[found.valid].sum().backward()
    assert video.grad[0].unique().tolist() == pytest.approx([3 / 48])
    assert video.grad[1].abs().max() == 0


def test_a_weight_of_zero_watches():
    parts = {"a": Part([1.0, 2.0], differentiable=True), "held_out": Part([float("nan"), 7.0], scope="group")}
    reward = weighted(parts, {"a": 1.0, "held_out": 0.0})
    assert reward.differentiable
    assert reward.scope == "group"
    found = reward(clips())
    assert found.valid.all()
    assert found.total.tolist() == [1, 2]
    assert found.dims["held_out"][1] == 7


@pytest.mark.parametrize(
    ("scopes", "widest"), [(("clip", "clip"), "clip"), (("group", "clip"), "group"), (("group", "batch"), "batch")]
)
def test_the_widest_scope_is_the_scope(scopes, widest):
    parts = dict(zip("ab", (Part([0.0], scope=scope) for scope in scopes), strict=True))
    assert weighted(parts, {"a": 1, "b": 1}).scope == widest


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, False)])
def test_differentiable_if_every_part_is(kinds):
    parts = dict(zip("ab", (Part([0.0], differentiable=kind) for kind in kinds), strict=True))
    assert weighted(parts, {"a": 1, "b": 1}).differentiable == all(kinds)


def test_nests():
    inner = weighted({"a": Part([1.0, 2.0])}, {"a": 3.0})
    found = weighted({"inner": inner}, {"inner": 0.5})(clips())
    assert found.total.tolist() == [1.5, 3]
    assert found.dims["inner/a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("ab", {"a": 1.0}, "must name the same"),
        ("a", {"a": 1.0, "b": 1.0}, "must name the same"),
        ("", {}, "must name the same"),
        ("", None, "must name the same"),
        ("a", {"a": float("nan")}, "finite"),
        ("ab", {"a": 0.0, "b": 0}, "every weight is 0"),
    ],
)
def test_names_and_weights_must_fit(names, weights, message):
    with pytest.raises(RewardError, match=message):
        weighted({name: Part([0.0]) for name in names}, weights)


class Spaced(Reward):
    """Mean pixel of evenly spaced frames."""

    name = "spaced"

    def __init__(self, frames):
        self.frames = frames

    def indices(self, length, fps):
        return torch.linspace(0, length - 1, min(self.frames, length)).round().long().tolist()

    def score(self, clips):
        return Scores(torch.stack([clip.video[self.indices(len(clip.video), clip.fps)].mean() for clip in clips]))


@pytest.mark.parametrize(("frames", "kept"), [((3, 3), 3), ((3, 4), 6)])
def test_only_frames_that_no_part_looks_at_are_left_out(frames, kept):
    parts = {"a": Spaced(frames[0]), "b": Spaced(frames[1])}
    reward = weighted(parts, {"a": 1.0, "b": 1.0})
    clip = clips(torch.arange(6.0).div(10).view(1, 6, 1, 1, 1).expand(1, 6, 3, 4, 4))[0]
    seen = reward.indices(6, clip.fps)
    assert len(seen) == kept  # 0 2 5 and 0 2 3 5: of these four, three would be 0 3 5
    assert reward([clip.frames(seen)]).total.item() == pytest.approx(reward([clip]).total.item())
