"""What calling a reward makes of questions and answers, also of those that break the contract."""

import pytest
import torch

from rewards import Clip, Reward, RewardError, Scores, answers, lift, weighted, win_rate

from .clips import PROMPTS, clips_on, mean_brightness, sprites


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
