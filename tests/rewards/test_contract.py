"""One contract, held by every reward; and what `score` makes of answers that break it."""

from dataclasses import replace

import pytest
import torch

from rewards import KNOWN, Clip, Reward, RewardError, Scores, answers, lift, load, per_frame, weighted, win_rate

PROMPTS = [
    "a red circle moving right quickly on a black background",
    "a blue square moving up slowly on a white background",
    "a green triangle",
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def mean_brightness(videos, prompts):
    return videos.mean((1, 2, 3, 4)) + torch.tensor([len(prompt) / 1000 for prompt in prompts], device=videos.device)


def sprites(num=3, frames=6, size=32):
    """Clips (N, F, 3, H, W): squares of three sizes and colours that drift over plain backgrounds."""
    video = torch.zeros(num, frames, 3, size, size)
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.15, 0.25, 0.95], [0.1, 0.75, 0.15]])
    for clip in range(num):
        video[clip] = 0.05 + 0.45 * clip
        for frame in range(frames):
            left, side = 4 + frame + clip, 9 + clip
            video[clip, frame, :, 8 : 8 + side, left : left + side] = colours[clip % 3][:, None, None]
    return video


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


def clips_on(device="cpu", video=None, prompts=PROMPTS):
    video = sprites() if video is None else video
    return [Clip(one.to(device), prompt) for one, prompt in zip(video, prompts, strict=True)]


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


class Answer:
    """A reward that answers what it is given."""

    name, scope, differentiable = "answer", "clip", True

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, clips):
        return self.answer


def answer_with(scores):
    return lift(Answer(scores))(clips_on())


def test_a_number_that_is_none_is_masked_and_its_neighbours_stay():
    total = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    found = answer_with(Scores(total))
    assert found.valid.tolist() == [True, False, False]
    assert found.total.isnan().tolist() == [False, True, True]
    found.total[found.valid].sum().backward()
    assert total.grad.tolist() == [1, 0, 0]


def test_a_failed_call_is_never_a_number():
    found = answer_with(Scores(torch.tensor([1.0, 2.0, 3.0]), valid=torch.tensor([True, False, True])))
    assert found.valid.tolist() == [True, False, True]
    assert found.total[1].isnan()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(3), "returned Tensor, expected rewards.Scores"),
        (Scores(torch.zeros(2)), r"total has shape \(2,\), expected \(3,\)"),
        (Scores(torch.zeros(3, 1)), r"total has shape \(3, 1\)"),
        (Scores([0.0, 0.0, 0.0]), "total has shape list"),
        (Scores(torch.zeros(3), None), "dims is a NoneType"),
        (Scores(torch.zeros(3), {"vq": torch.zeros(1)}), r"dims\['vq'\] has shape \(1,\)"),
        (Scores(torch.zeros(3), dense=torch.zeros(4, 3)), r"dense has shape \(4, 3\), expected \(3, 3\)"),
        (Scores(torch.zeros(3), dense=torch.zeros(3)), r"dense has shape \(3,\)"),
        (Scores(torch.zeros(3), dense=[1]), "dense has shape list"),
        (Scores(torch.zeros(3), valid=torch.ones(1, dtype=torch.bool)), r"valid has shape \(1,\)"),
    ],
)
def test_an_answer_of_another_form_names_the_reward(answer, message):
    with pytest.raises(RewardError, match=f"reward answer: {message}"):
        answer_with(answer)


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        (sprites(), None, "videos but no prompts"),
        (list(sprites()), None, "videos but no prompts"),
        (sprites(), PROMPTS[:2], "3 videos and 2 prompts"),
        (sprites(), "a red circle", "3 videos and one string"),
        (sprites(), ["a", "b", None], "expected a tensor and a str"),
        (list(sprites().numpy()), PROMPTS, "expected a tensor and a str"),
    ],
)
def test_videos_and_prompts_must_fit(videos, prompts, message):
    with pytest.raises(RewardError, match=message):
        lift(mean_brightness)(videos, prompts)


def test_rates_must_fit():
    with pytest.raises(RewardError, match="3 videos and 2 rates"):
        lift(mean_brightness)(sprites(), PROMPTS, fps=[8.0, 8.0])


def test_clips_may_come_from_a_generator():
    assert lift(mean_brightness)(clip for clip in clips_on()).total.shape == (3,)


def test_clips_of_one_prompt_are_one_group():
    class Groups(Answer):
        def __call__(self, clips):
            return Scores(torch.tensor([float(clip.group) for clip in clips]))

    assert lift(Groups(None))(sprites(), ["b", "a", "b"]).total.tolist() == [0, 1, 0]


def test_asynchronous_rewards_run_side_by_side_and_one_failure_stays_one():
    import asyncio

    arrived = []

    class Waits(Answer):
        async def __call__(self, clips):
            arrived.append(self)
            while len(arrived) < 2:  # ends only if the other one runs meanwhile
                await asyncio.sleep(0.001)
            return self.answer

    def broken(videos, prompts):
        raise KeyError("judge")

    rewards = {"a": Waits(Scores(torch.zeros(3))), "b": Waits(Scores(torch.ones(3))), "c": broken}
    found = answers({name: lift(reward) for name, reward in rewards.items()}, clips_on())
    assert list(found) == ["a", "b", "c"]
    assert [found[name].total.tolist() for name in "ab"] == [[0] * 3, [1] * 3]
    assert isinstance(found["c"], KeyError)


def test_an_awaitable_is_waited_for_under_a_running_loop():
    import asyncio

    class Remote(Answer):
        async def __call__(self, clips):
            await asyncio.sleep(0)
            return self.answer

    async def notebook():
        return lift(Remote(Scores(torch.arange(3.0))))(clips_on())

    assert asyncio.run(notebook()).total.tolist() == [0, 1, 2]


def test_no_clips_is_an_error():
    with pytest.raises(RewardError, match="no clips"):
        lift(Answer(Scores(torch.zeros(0))))([])


def test_an_awaitable_is_waited_for():
    class Remote(Answer):
        async def __call__(self, clips):
            return self.answer

    assert lift(Remote(Scores(torch.arange(3.0))))(clips_on()).total.tolist() == [0, 1, 2]


def test_a_reward_that_is_not_differentiable_runs_without_gradients():
    def watcher(videos, prompts):
        assert not torch.is_grad_enabled()
        return videos.mean((1, 2, 3, 4))

    assert not lift(watcher)(clips_on(video=sprites().requires_grad_())).total.requires_grad


@pytest.mark.parametrize("way", ["alone", "under a running loop", "side by side", "as a part"])
@pytest.mark.parametrize(("differentiable", "allowed"), [(False, True), (True, True), (True, False)])
def test_an_asynchronous_reward_has_gradients_where_it_and_the_caller_want_them(way, differentiable, allowed):
    import asyncio

    class Watcher(Answer):
        async def __call__(self, clips):
            await asyncio.sleep(0)
            return Scores(torch.stack([clip.video.mean() for clip in clips]))

    watcher = Watcher(None)
    watcher.differentiable = differentiable
    reward, clips = lift(watcher), clips_on(video=sprites().requires_grad_())

    async def notebook():
        return reward(clips)

    calls = {
        "alone": lambda: reward(clips),
        "under a running loop": lambda: asyncio.run(notebook()),
        "side by side": lambda: answers({"watcher": reward}, clips)["watcher"],
        "as a part": lambda: weighted({"watcher": reward})(clips),
    }
    with torch.set_grad_enabled(allowed):
        assert calls[way]().total.requires_grad == (differentiable and allowed)


def test_lift_takes_plain_numbers_and_keeps_a_reward():
    lifted = lift(lambda videos, prompts: [1, 2.5, float("nan")], name="numbers")
    assert lifted.name == "numbers"
    assert lifted(clips_on()).total[:2].tolist() == [1, 2.5]
    assert lift(lifted) is lifted


def test_lift_refuses_a_scope_that_is_none():
    reward = Answer(Scores(torch.zeros(3)))
    reward.scope = "clips"
    with pytest.raises(RewardError, match="reward answer: scope is 'clips', expected one of clip, group, batch"):
        lift(reward)


def test_a_reward_without_a_name_is_one_all_the_same():
    class Nameless(Reward):
        def score(self, clips):
            return Scores(torch.stack([clip.video.mean() for clip in clips]))

    assert win_rate(Nameless())(clips_on(prompts=["a"] * 3)).total.tolist() == [0, 0.5, 1]


def test_lift_explains_what_it_cannot_use():
    with pytest.raises(RewardError, match="reward words: expected 3 numbers"):
        lift(lambda videos, prompts: ["good"] * 3, name="words")(clips_on())
    with pytest.raises(RewardError, match="one shape"):
        lift(mean_brightness)([Clip(torch.rand(2, 3, 8, 8), ""), Clip(torch.rand(3, 3, 8, 8), "")])
