"""One contract, held by every reward."""

from dataclasses import replace

import pytest
import torch

from rewards import KNOWN, Clip, RewardError, Scores, lift, load, per_frame, weighted, win_rate

from .clips import PROMPTS, clips_on, mean_brightness, sprites

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def clip_reward(folder):
    return load("clip", path=str(folder), frames=4)


BUILDERS = {
    "aesthetic": lambda files: load("aesthetic", head=str(files[0]), path=str(files[1])),
    "clip": clip_reward,
    "hpsv2": lambda files: load("hpsv2", path=str(files[0]), model=str(files[1]), frames=4, weights="best"),
    "hpsv3": lambda saved: load(
        "hpsv3", path=str(saved.folder), base=str(saved.folder / "base"), pixels=576, frames=3, device="cpu"
    ),
    "pickscore": lambda folder: load("pickscore", path=str(folder), frames=3, weights="attenuated"),
    "segments": lambda folder: per_frame(lift(mean_brightness, differentiable=True), 3, "segment", "attenuated_mean"),
    "video_reward": lambda saved: load("video_reward", path=str(saved.folder), device="cpu"),
    "vlm_rm": lambda folder: load("vlm_rm", baseline="a circle", path=str(folder), frames=2),
    "aspects": lambda url: load(
        "aspects",
        reward={"use": "vlm_score", "options": {"url": url, "model": "bright", "frames": 4}},
        groups={"text": ["alignment"], "look": ["physics", "style"]},
    ),
    "per_frame": lambda folder: load("per_frame", image_reward={"use": "clip", "options": {"path": str(folder)}}),
    "lifted": lambda folder: lift(mean_brightness, differentiable=True),
    "weighted": lambda folder: weighted(
        {"clip": clip_reward(folder), "bright": lift(mean_brightness, differentiable=True)}, {"clip": 1, "bright": -0.5}
    ),
    "weighted_mixed": lambda folder: weighted(
        {"clip": clip_reward(folder), "colour": load("sprite_colour")}, {"clip": 2.0, "colour": 1.0}
    ),
    **{name: lambda folder, name=name: load(name) for name in KNOWN if name.startswith("sprite_")},
    "remote": lambda url: load("remote", url=url, name="sprite_colour", timeout=30, patience=10),
    "vlm_defects": lambda url: load("vlm_defects", url=url, model="dark", frames=4),
    "vlm_pairwise": lambda url: load("vlm_pairwise", url=url, model="bright", frames=4),
    "vlm_score": lambda url: load("vlm_score", url=url, model="bright", frames=4),
    "vlm_yes": lambda folder: load("vlm_yes", model=str(folder), frames=3, top_logprobs=400, device="cpu"),
    "win_rate": lambda folder: win_rate(clip_reward(folder)),
}


# The fixture whose value a builder is given; clip_folder for all others.
FIXTURES = {
    "aesthetic": "aesthetic_files",
    "aspects": "judge_url",
    "hpsv2": "hpsv2_files",
    "hpsv3": "hpsv3",
    "pickscore": "clip_hf_folder",
    "remote": "reward_server",
    "video_reward": "video_reward",
    "vlm_defects": "defects_url",
    "vlm_pairwise": "judge_url",
    "vlm_score": "judge_url",
    "vlm_yes": "judge_folder",
}


@pytest.fixture(scope="module", params=BUILDERS)
def reward(request):
    return BUILDERS[request.param](request.getfixturevalue(FIXTURES.get(request.param, "clip_folder")))


def prompts_for(reward):
    """Three prompts, or one three times where the clips of a prompt are compared."""
    return PROMPTS if reward.scope == "clip" else PROMPTS[:1] * 3


def clips_for(reward, device="cpu", video=None):
    return clips_on(device, video, prompts_for(reward))


def same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.total, expected.total, atol=tolerance, rtol=0, equal_nan=True)
    assert found.dims.keys() == expected.dims.keys()
    for name, values in expected.dims.items():
        torch.testing.assert_close(found.dims[name], values, atol=tolerance, rtol=0, equal_nan=True)
    if expected.dense is not None:
        torch.testing.assert_close(found.dense, expected.dense, atol=tolerance, rtol=0)


def rows(scores, order):
    return Scores(
        scores.total[order],
        {name: values[order] for name, values in scores.dims.items()},
        None if scores.dense is None else scores.dense[order],
    )


def test_every_known_reward_is_in_this_suite():
    assert set(KNOWN) <= set(BUILDERS)


def test_has_the_three_attributes(reward):
    assert isinstance(reward.name, str)
    assert reward.scope in ("clip", "group", "batch")
    assert isinstance(reward.differentiable, bool)


@pytest.mark.parametrize("device", DEVICES)
def test_gives_one_float32_a_clip_on_the_clips_device(reward, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    answer = reward(clips_for(reward, device))
    for values in (answer.total, *answer.dims.values()):
        assert (values.shape, values.dtype, values.device.type) == ((3,), torch.float32, device)
    assert answer.valid.all()
    assert answer.total.isfinite().all()


def test_same_clips_same_scores(reward):
    first, second = reward(clips_for(reward)), reward(clips_for(reward))
    same(second, first, tolerance=0)


def test_a_batch_scores_as_its_parts_alone(reward):
    """Parts are single clips, or groups where the clips of a prompt are compared."""
    parts = [[clip] for clip in clips_for(reward)]
    if reward.scope == "group":
        second = [replace(clip, prompt=PROMPTS[1], group=1) for clip in clips_for(reward)[1:]]
        parts = [clips_for(reward), second]
    together, start = reward([clip for part in parts for clip in part]), 0
    for part in parts:
        same(reward(part), rows(together, list(range(start, start + len(part)))))
        start += len(part)


def test_scores_follow_their_clips(reward):
    order = [2, 0, 1]
    clips = clips_for(reward)
    same(reward([clips[index] for index in order]), rows(reward(clips), order))


def test_does_not_write_into_the_clips(reward):
    video = sprites()
    reward(clips_for(reward, video=video))
    assert torch.equal(video, sprites())


def test_draws_nothing_from_the_global_generator(reward):
    state = torch.get_rng_state()
    reward(clips_for(reward))
    assert torch.equal(state, torch.get_rng_state())


def test_gradient_where_claimed_and_none_elsewhere(reward):
    video = sprites().requires_grad_()
    total = reward(clips_for(reward, video=video)).total
    assert total.requires_grad == reward.differentiable
    if reward.differentiable:
        total[0].backward()
        assert video.grad[0].abs().max() > 0
        assert video.grad[0].isfinite().all()
        assert video.grad[1:].abs().max() == 0


def test_videos_with_prompts_are_clips(reward):
    prompts = prompts_for(reward)
    same(reward(sprites(), prompts, fps=16.0), reward(clips_for(reward)), tolerance=0)
    same(reward(list(sprites()), prompts, fps=[16.0] * 3), reward(clips_for(reward)), tolerance=0)


def test_frames_that_it_does_not_look_at_may_be_left_out(reward):
    clips = clips_for(reward)
    seen = [reward.indices(len(clip.video), clip.fps) for clip in clips]
    alone = [clip.frames(indices) for clip, indices in zip(clips, seen, strict=True)]
    assert [reward.indices(len(clip.video), clip.fps) for clip in alone] == [list(range(len(s))) for s in seen]
    same(reward(alone), reward(clips))


@pytest.mark.parametrize("pixel", [float("nan"), float("inf"), 255.0, -1.0])
def test_pixels_outside_the_range_are_named(reward, pixel):
    video = sprites()
    video[1, 2, 0, 3, 3] = pixel
    start = prompts_for(reward)[1][:10]
    with pytest.raises(RewardError, match=rf"reward {reward.name}: the video of '{start}.*expected \[0, 1\]"):
        reward(clips_for(reward, video=video))


def test_half_precision_video_is_scored(reward):
    found = reward(clips_for(reward, video=sprites().bfloat16()))
    assert found.total.dtype == torch.float32
    assert found.total.isfinite().all()


@pytest.mark.parametrize(
    "video",
    [torch.rand(3, 4, 32, 32), torch.rand(4, 3, 32), (torch.rand(4, 3, 32, 32) * 255).byte(), torch.rand(0, 3, 32, 32)],
)
def test_a_video_of_another_form_is_named(reward, video):
    with pytest.raises(RewardError, match=rf"reward {reward.name}: a clip's video is .*expected \(F, 3, H, W\)"):
        reward([Clip(video, "a red circle")])
