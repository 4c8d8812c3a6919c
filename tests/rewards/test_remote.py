"""A served reward against the same one in process, on a real server."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from rewards import Clip, RewardError, answers, load, remote
from rewards.serving.wire import quantised
from tests.rewards import served_rewards
from tests.rewards.servers import health, serving, wait_until

FILE = served_rewards.__file__
LOCAL = {"calm": lambda: load(f"{FILE}:calm", scale=2.0), "few": lambda: load(f"{FILE}:Few", name="few")}
SPRITES = ("sprite_motion", "sprite_colour", "sprite_match")


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """The calls of some rewards end while this file exists."""
    path = tmp_path_factory.mktemp("gate") / "open"
    path.touch()
    return path


@pytest.fixture(scope="module")
def server(gate):
    rewards = [
        *SPRITES,
        f"calm={FILE}:calm:scale=2.0",
        f"few={FILE}:Few",
        f"shows={FILE}:Shows",
        f"gated={FILE}:Shows:gate={gate}",
        f"groups={FILE}:Shows:scope=group,gate={gate}",
        f"batch={FILE}:Shows:scope=batch,gate={gate}",
        f"picky={FILE}:Picky",
    ]
    with serving(*(word for use in rewards for word in ("--reward", use)), "--wait-ms", "50") as server:
        yield server


@pytest.fixture(scope="module")
def ask(server):
    """Build a client of one of the rewards."""
    return lambda name, **options: remote(server.url, name, **{"timeout": 30, "patience": 5, **options})


def noise(num=3, frames=6, height=32, width=32, seed=0):
    return torch.rand(num, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def levels(video):
    return quantised(video).float() / 255


PROMPTS = ["a red circle moving right", "a blue square", "a triangle on a white background"]


def equal(found, expected):
    torch.testing.assert_close(found.total, expected.total, atol=0, rtol=0, equal_nan=True)
    assert found.valid.tolist() == expected.valid.tolist()
    assert found.dims.keys() >= expected.dims.keys()
    for name in expected.dims.keys() - {"call", "clips", "members", "sent"}:
        torch.testing.assert_close(found.dims[name], expected.dims[name], atol=0, rtol=0, equal_nan=True)
    assert (found.dense is None) == (expected.dense is None)
    if expected.dense is not None:
        torch.testing.assert_close(found.dense, expected.dense, atol=0, rtol=0)


@pytest.mark.parametrize("name", [*SPRITES, *LOCAL])
def test_scores_are_those_of_the_reward_in_process(ask, name):
    local = LOCAL[name]() if name in LOCAL else load(name)
    equal(ask(name)(noise(), PROMPTS, fps=8.0), local(levels(noise()), PROMPTS, fps=8.0))


def test_pixels_go_to_the_nearest_level_and_what_overshoots_is_clipped(ask):
    video = torch.tensor([-0.05, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.05]).view(6, 1, 1, 1, 1)
    video = video.expand(6, 2, 3, 4, 4)
    total = ask("shows")(video, ["x"] * 6).total
    torch.testing.assert_close(total, torch.tensor([0, 0, 0, 1, 255, 255]) / 255, atol=1e-7, rtol=0)


def test_only_the_frames_that_the_reward_looks_at_are_sent(ask):
    reward = ask("few")
    assert reward.indices(9, 16.0) == [0, 2, 4, 6, 8]
    found = reward(noise(frames=7), PROMPTS, fps=14.0)
    assert found.dims["sent"].tolist() == [4, 4, 4]
    assert found.dims["frames"].tolist() == [4, 4, 4]
    assert found.dims["fps"].tolist() == [8, 8, 8]  # the duration stays


def test_clips_of_different_sizes_and_lengths_come_back_in_order(ask):
    shapes = [(6, 3, 16, 16), (3, 3, 8, 24), (6, 3, 16, 16), (9, 3, 20, 8), (3, 3, 8, 24)]
    values = [0.2, 0.4, 0.6, 0.8, 1.0]
    clips = [Clip(torch.full(shape, value), "") for shape, value in zip(shapes, values, strict=True)]
    for options in ({}, {"request_mb": 0.001}, {"request_mb": 0.005, "concurrency": 1}):
        found = ask("few", **options)(clips)
        torch.testing.assert_close(found.total, torch.tensor(values), atol=1e-6, rtol=0)
        assert found.dims["frames"].tolist() == [3, 3, 3, 5, 3]
        assert found.dense is None  # of different lengths


def test_answers_of_many_requests_are_put_together(ask):
    clips = [Clip(video, "", meta={"number": i}) for i, video in enumerate(noise(40, 6, 8, 8))]
    found = ask("few", request_mb=0.002)(clips)
    expected = LOCAL["few"]()([Clip(levels(clip.video), "", meta=clip.meta) for clip in clips])
    equal(found, expected)
    assert found.dims["meta"].tolist() == list(range(40))
    assert found.dims["clips"].max() < 40


def test_scope_is_the_servers_unless_it_is_given(ask, server):
    assert [ask(name).scope for name in ("shows", "groups", "batch")] == ["clip", "group", "batch"]
    assert ask("shows", scope="group").scope == "group"
    assert not ask("shows").differentiable


@pytest.fixture
def side_by_side(ask, server, gate):
    """What `call(client, i)` returns for `num` clients of a reward, all of whose questions wait at the same time."""

    def run(num, name, call):
        gate.unlink()
        with ThreadPoolExecutor(num + 1) as pool:
            try:
                ahead = pool.submit(ask(name), noise(1, 2, 4, 4), ["ahead"])  # of a shape that joins no other question
                wait_until(lambda: health(server.url, name)["busy_seconds"] is not None)
                waiting = [pool.submit(call, ask(name), index) for index in range(num)]
                wait_until(lambda: health(server.url, name)["waiting"] == num)
            finally:
                gate.touch()
            assert ahead.result(30).valid.all()
            return [answer.result(30) for answer in waiting]

    return run


def test_questions_of_several_clients_share_calls(side_by_side):
    videos = [noise(2, 2, 8, 8, seed=index) for index in range(6)]
    found = side_by_side(6, "gated", lambda client, index: client(videos[index], ["a", "b"]))
    for scores, video in zip(found, videos, strict=True):
        torch.testing.assert_close(scores.total, levels(video).mean((1, 2, 3, 4)), atol=1e-6, rtol=0)
        assert scores.dims["clips"].tolist() == [12, 12]
    assert len({scores.dims["call"][0].item() for scores in found}) == 1


def test_a_call_has_no_more_clips_than_asked_for(side_by_side):
    found = side_by_side(6, "gated", lambda client, _: client(noise(6, 2, 8, 8), ["x"] * 6))
    assert [scores.dims["clips"].tolist() for scores in found] == [[12] * 6] * 6  # 16 at most, and no question divided


def test_clips_of_other_sizes_are_another_call(side_by_side):
    found = side_by_side(4, "gated", lambda client, index: client(noise(1, 2, 8, 8 + index % 2), ["x"]))
    calls = [scores.dims["call"].item() for scores in found]
    assert calls[0] == calls[2] != calls[1] == calls[3]


def test_groups_of_different_questions_do_not_mix(side_by_side):
    """All clients use the same group numbers; each clip must see the clips of its own client alone."""
    videos, groups = [noise(4, 2, 8, 8, seed=index) for index in range(4)], [7, 3, 7, 7]

    def call(client, index):
        return client([Clip(video, "", group=group) for video, group in zip(videos[index], groups, strict=True)])

    for scores, video in zip(side_by_side(4, "groups", call), videos, strict=True):
        assert scores.dims["members"].tolist() == [3, 1, 3, 3]
        mean = levels(video).mean((1, 2, 3, 4))
        expected = mean - torch.where(torch.tensor([True, False, True, True]), mean[[0, 2, 3]].mean(), mean[1])
        torch.testing.assert_close(scores.total, expected, atol=1e-6, rtol=0)
        assert scores.dims["clips"].tolist() == [16] * 4  # they did share a call


def test_a_group_is_never_divided(ask):
    groups = [0, 1, 2, 0, 1, 2, 0, 1]
    clips = [Clip(video, "", group=group) for video, group in zip(noise(8, 2, 8, 8), groups, strict=True)]
    found = ask("groups", request_mb=0.0005)(clips)
    assert found.dims["members"].tolist() == [groups.count(group) for group in groups]


def test_a_reward_of_scope_batch_sees_a_question_a_call(side_by_side):
    found = side_by_side(3, "batch", lambda client, _: client(noise(4, 2, 8, 8), ["x"] * 4))
    assert [scores.dims["clips"].tolist() for scores in found] == [[4] * 4] * 3
    assert len({scores.dims["call"][0].item() for scores in found}) == 3


def test_a_reward_of_scope_batch_is_asked_about_all_clips_at_once(ask):
    assert ask("batch", request_mb=0.0001)(noise(4, 2, 8, 8), ["x"] * 4).dims["clips"].tolist() == [4] * 4


def test_one_clients_bad_clip_does_not_fail_its_neighbours(ask):
    prompts = ["good", "fail", "good", "exit", "good"]
    clients = [ask("picky") for _ in prompts]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda client, prompt: client(noise(1, 2, 8, 8), [prompt]), clients, prompts))
    assert [scores.valid.item() for scores in found] == [prompt == "good" for prompt in prompts]
    assert clients[1].failures == {f"{clients[1].url} fails: 500 reward picky: ValueError: cannot digest this": 1}
    assert clients[0](noise(1, 2, 8, 8), ["good"]).total.item() == 1  # and the worker lives


def test_a_failed_request_masks_its_clips_and_no_others(ask, caplog):
    reward = ask("picky", request_mb=0.0004)  # one clip a request
    for _ in range(2):
        found = reward(noise(3, 2, 8, 8), ["good", "fail", "good"])
        assert found.valid.tolist() == [True, False, True]
        assert found.total.isnan().tolist() == [False, True, False]
        assert found.dims["reading"].isnan().tolist() == [False, True, False]
        assert found.dense.isnan().any(1).tolist() == [False, True, False]
    assert sum(reward.failures.values()) == 2
    assert len([record for record in caplog.records if record.name == "rewards.remote"]) == 1


def test_what_the_reward_refuses_is_an_error_here_too(ask):
    with pytest.raises(RewardError, match="refuses: 422 reward picky: not this prompt$"):
        ask("picky")(noise(1, 2, 8, 8), ["refuse"])


def test_failed_frames_mask_all_clips(ask):
    reward = ask("picky")
    assert not reward(noise(2, 13, 8, 8), ["good", "good"]).valid.any()
    with pytest.raises(RewardError, match="KeyError: 'thirteen'"):
        reward.indices(13, 16.0)


def test_a_number_that_is_none_is_masked(ask):
    found = ask("picky")(noise(3, 2, 8, 8), ["nan", "inf", "x"])
    assert found.valid.tolist() == [False, False, True]
    assert found.dims["reading"].isnan().tolist() == [True, True, False]


def test_runs_beside_other_rewards_and_under_a_running_loop(ask):
    import asyncio

    found = answers({"a": ask("gated"), "b": ask("shows"), "c": load("sprite_colour")}, clips_of(noise()))
    assert all(found[name].valid.all() for name in "abc")

    async def notebook():
        return ask("shows")(noise(), PROMPTS)

    assert asyncio.run(notebook()).valid.all()


def clips_of(videos):
    return [Clip(video, prompt) for video, prompt in zip(videos, PROMPTS, strict=True)]


def test_health_counts(server, ask):
    reward = ask("shows")
    before = health(server.url, "shows")
    reward(noise(), PROMPTS)
    after = httpx.get(f"{server.url}/health").json()
    assert after["ready"] is True
    assert after["rewards"]["shows"]["clips"] == before["clips"] + 3
    assert after["rewards"]["shows"]["waiting"] == 0
    assert after["rewards"]["shows"]["busy_seconds"] is None


def test_an_unknown_name_and_a_server_that_is_none_are_named(server):
    with pytest.raises(RewardError, match="reward nobody: .* has no reward of this name; it serves sprite_motion, "):
        remote(server.url, "nobody")
    with pytest.raises(RewardError, match="reward shows: http://127.0.0.1:9 does not answer: .*start python -m"):
        remote("http://127.0.0.1:9", "shows")
    with pytest.raises(RewardError, match="reward nobody: .* refuses: 404 no reward nobody; served here: spr"):
        remote(server.url, "nobody", scope="clip")(noise(), PROMPTS)


def test_a_meta_that_is_no_json_is_named(ask):
    with pytest.raises(RewardError, match="reward shows: a clip's meta is not JSON"):
        ask("shows")([Clip(noise()[0], "", meta={"x": {1, 2}})])
