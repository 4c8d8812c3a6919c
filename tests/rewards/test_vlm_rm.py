"""GoalBaselineReward against its formula, written out in numpy with the whole projection matrix."""

import numpy as np
import pytest
import torch

from rewards import RewardError, check, load
from rewards.vlm_rm import goal_baseline

from .test_hpsv2 import bytes_video

PROMPTS = ["a red circle moving left", "a blue square"]
OPTIONS = {"baseline": "a circle", "frames": None}


def by_formula(image, target, baseline, alpha):
    """Rewards of images (M, D) in float64."""
    direction = target - baseline
    projection = np.outer(direction, direction) / (direction @ direction)
    projection = alpha * projection + (1 - alpha) * np.eye(len(direction))
    return 1 - np.linalg.norm((image - target) @ projection, axis=-1) ** 2 / 2


class ByOpenClip:
    """Unit embeddings by open_clip alone, in float64."""

    def __init__(self, folder):
        import open_clip

        self.model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.tokenizer, self.normalise = open_clip.get_tokenizer(f"local-dir:{folder}"), transform.transforms[-1]
        self.model.eval()

    @torch.no_grad()
    def texts(self, prompts):
        return self.model.encode_text(self.tokenizer(prompts), normalize=True).double().numpy()

    @torch.no_grad()
    def images(self, images):
        squashed = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
        return self.model.encode_image(self.normalise(squashed), normalize=True).double().numpy()


@pytest.fixture(scope="module")
def reference(clip_folder):
    return ByOpenClip(clip_folder)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(32, 32), (40, 60)])
def test_equals_the_formula_with_the_prompts_as_targets(clip_folder, reference, alpha, shape):
    videos = bytes_video(2, 3, 3, *shape)
    baseline, targets = reference.texts(["a circle"])[0], reference.texts(PROMPTS)
    expected = [
        by_formula(reference.images(video), target, baseline, alpha)
        for video, target in zip(videos, targets, strict=True)
    ]
    found = load("vlm_rm", path=str(clip_folder), alpha=alpha, **OPTIONS)(videos, PROMPTS, fps=8)
    np.testing.assert_allclose(found.dense.numpy(), np.stack(expected), atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.total.numpy(), np.stack(expected).mean(1), atol=1e-5, rtol=0)


def test_several_prompts_are_averaged_and_stay_shorter_than_one(clip_folder, reference):
    videos = bytes_video(2, 2, 3, 32, 32)
    targets, baselines = ["a circle at the top", "a circle high up"], ["a circle", "a thing"]
    target, baseline = reference.texts(targets).mean(0), reference.texts(baselines).mean(0)
    assert np.linalg.norm(target) < 0.995
    expected = [by_formula(reference.images(video), target, baseline, 0.5) for video in videos]
    found = load("vlm_rm", path=str(clip_folder), target=targets, baseline=baselines)(videos, PROMPTS)
    np.testing.assert_allclose(found.dense.numpy(), np.stack(expected), atol=1e-5, rtol=0)


def test_alpha_0_is_the_cosine(clip_folder):
    # With unit vectors, 1 - |x - t|^2 / 2 = x . t
    videos = bytes_video(2, 2, 3, 32, 32)
    goal = load("vlm_rm", path=str(clip_folder), alpha=0, **OPTIONS)(videos, PROMPTS)
    clip = load("clip", path=str(clip_folder))(videos, PROMPTS)
    torch.testing.assert_close(goal.total, clip.total, atol=1e-5, rtol=0)


def test_alpha_1_counts_only_what_lies_between_baseline_and_target():
    # In the plane: target (1, 0), baseline (0, 1), so the way is (1, -1) / sqrt 2.
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = goal_baseline(image, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1.0)
    # (x - t) on the way: 0; -sqrt 2; -sqrt 2, of which half the squares are 0, 1, 1
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_a_prompt_that_is_the_baseline_is_masked(clip_folder):
    found = load("vlm_rm", path=str(clip_folder), **OPTIONS)(bytes_video(2, 2, 3, 32, 32), ["a circle", "a square"])
    assert found.valid.tolist() == [False, True]


def test_gradient_matches_finite_differences(clip_folder):
    reward = load("vlm_rm", path=str(clip_folder), alpha=0.7, **OPTIONS)
    video = (0.3 + 0.4 * bytes_video(1, 2, 3, 36, 44)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS[:1]).total.sum(), video)
    step = 0.02 * gradient / gradient.norm()
    up, down = (reward((video + sign * step).detach(), PROMPTS[:1]).total.item() for sign in (1, -1))
    assert (up - down) / 0.04 == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "missing a required argument: 'baseline'"),
        ({"baseline": "a", "alpha": 1.5}, "alpha is 1.5"),
        ({"baseline": ""}, "baseline is ''"),
        ({"baseline": "a", "target": []}, r"target \[\]"),
        ({"baseline": ["a"], "target": "a"}, "no way between them"),
        ({"baseline": "a"}, "no checkpoint named"),
    ],
)
def test_options_are_checked_in_one_line(options, message):
    with pytest.raises(RewardError, match=message) as caught:
        check("vlm_rm", **options)
    assert str(caught.value).startswith("reward vlm_rm: ")
    assert "\n" not in str(caught.value)
