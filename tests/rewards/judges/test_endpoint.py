"""An endpoint that answers well, badly, late, or not at all; every server here is a real one on this machine."""

import asyncio
import gc
import logging
import threading
import weakref

import numpy as np
import pytest
import torch

from rewards import Clip, RewardError, load
from tests.rewards.judges.judge_servers import (
    ScriptedServer,
    content_of,
    drops,
    hangs,
    in_turn,
    says,
    sends,
    trickles,
)

GOOD = says("Final Score: 4")
CLIP = Clip(torch.full((2, 3, 8, 8), 0.5), "a red circle")


def judge(server, url=None, **options):
    defaults = {"style": "final", "backoff": 0.01, "retries": 2, "model": "m", "frames": 2}
    return load("vlm_score", url=url or server.url, **{**defaults, **options})


def test_the_request_is_what_an_openai_compatible_server_takes():
    video = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    with ScriptedServer(in_turn(GOOD)) as server:
        reward = judge(server, model="judge-7b", max_tokens=99, seed=5, extra={"top_k": 1, "model": "not this"})
        assert reward([Clip(video, "a {video} of {prompt}")]).total.tolist() == [0.75]
        request = server.requests[0]
        assert (server.path, server.headers.get("Authorization")) == ("/v1/chat/completions", None)
    parts = content_of(request)
    expected = (video * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert [part.shape for part in parts if not isinstance(part, str)] == [(5, 7, 3)] * 2
    assert np.array_equal([part for part in parts if not isinstance(part, str)], expected)  # lossless
    assert "Caption: a {video} of {prompt}\n" in parts[-1]  # nothing in a prompt is a place
    del request["messages"]
    assert request == {"model": "judge-7b", "temperature": 0.0, "seed": 5, "max_tokens": 99, "top_k": 1}


def test_jpeg_is_close_and_smaller():
    video = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    with ScriptedServer(in_turn(GOOD)) as server:
        judge(server, image_format="jpeg")([Clip(video, "")])
        found = next(part for part in content_of(server.requests[0]) if not isinstance(part, str))
        assert "data:image/jpeg" in str(server.requests[0])
    assert np.abs(found / 255 - video[0].permute(1, 2, 0).numpy()).max() < 0.03


def test_the_key_comes_from_the_environment_and_is_not_shown(monkeypatch, caplog):
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-secret\n")
    with ScriptedServer(in_turn(GOOD)) as server:
        judge(server, api_key_env="MY_JUDGE_KEY")([CLIP])
        assert server.headers["Authorization"] == "Bearer sk-secret"
        server.script = in_turn(sends(400, b"bad key sk-secret"))
        judge(server, api_key_env="MY_JUDGE_KEY")([CLIP])
        server.script = in_turn(sends(401, b"bad key sk-secret"))
        with pytest.raises(RewardError, match="401.*api_key_env") as error:
            judge(server, api_key_env="MY_JUDGE_KEY")([CLIP])
    assert "sk-secret" not in str(error.value) + caplog.text
    assert "bad key ***" in caplog.text


RETRIED = {
    "429": sends(429, b"slow down"),
    "500": sends(500, b"oops"),
    "503": sends(503, b"loading"),
    "408": sends(408, b"late"),
    "dropped in the body": drops,
    "no http": lambda handler: handler.wfile.write(b"hello\n"),
}


@pytest.mark.parametrize("fault", RETRIED)
def test_what_may_pass_is_tried_again(fault):
    with ScriptedServer(in_turn(RETRIED[fault], RETRIED[fault], GOOD)) as server:
        assert judge(server)([CLIP]).total.tolist() == [0.75]
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault", RETRIED)
def test_what_does_not_pass_is_masked_after_the_retries(fault, caplog):
    with ScriptedServer(in_turn(RETRIED[fault])) as server:
        found = judge(server)([CLIP, CLIP])
        assert len(server.requests) == 6  # two clips, one attempt and two retries each
    assert found.valid.tolist() == [False, False]
    assert found.total.isnan().all()
    assert caplog.text.count("such clips are masked") == 1


@pytest.fixture
def pauses(monkeypatch):
    """The seconds of all pauses, which take none."""
    seconds, sleep = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda pause: seconds.append(pause) or sleep(0))
    return seconds


def test_pauses_between_attempts_double(pauses):
    with ScriptedServer(in_turn(sends(500, b"oops"))) as server:
        judge(server, retries=4, backoff=0.25)([CLIP])
    assert pauses == [0.25, 0.5, 1.0, 2.0]


NOT_RETRIED = {
    "400": sends(400, {"error": {"message": "maximum context length"}}),
    "422": sends(422, b"Unexpected fields"),
    "no json": sends(200, b"<html>welcome</html>"),
    "empty": sends(200, b""),
    "list": sends(200, []),
    "no choices": sends(200, {"error": "x"}),
    "empty choices": sends(200, {"choices": []}),
    "text is null": sends(200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}),
    "text is a list": sends(200, {"choices": [{"message": {"content": ["Final Score: 4"]}, "finish_reason": "stop"}]}),
    "deep": sends(200, b'{"choices": ' + b"[" * 200_000),
    "zipped": sends(200, b"\x1f\x8b\x08\x00rubbish", **{"Content-Encoding": "gzip"}),
    "huge": says("Final Score: 4" + " " * (9 * 2**20)),
    "nonsense": says("I like it!"),
    "cut off": says("Final Score: 4", finish="length"),
}


@pytest.mark.parametrize("fault", NOT_RETRIED)
def test_an_answer_of_no_use_is_masked_at_once(fault, caplog):
    with ScriptedServer(in_turn(NOT_RETRIED[fault], GOOD)) as server:
        found = judge(server, concurrency=1)([CLIP, CLIP])
        assert len(server.requests) == 2
    assert found.valid.tolist() == [False, True]
    assert found.total[0].isnan()
    assert found.total[1] == 0.75
    assert caplog.text.count("such clips are masked") == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405])
def test_a_wrong_configuration_is_an_error_in_one_line(status):
    with ScriptedServer(in_turn(sends(status, b"what\nis this", Location="http://127.0.0.1:1/"))) as server:
        with pytest.raises(RewardError, match=rf"reward vlm_score: {server.url} answers {status} ") as error:
            judge(server)([CLIP, CLIP, CLIP])
        assert "\n" not in str(error.value)
    if status == 404:
        assert "/models lists the models" in str(error.value)


@pytest.mark.parametrize("fault", [hangs, trickles])
def test_a_request_ends_at_its_time_limit_and_is_tried_again(fault, caplog, pauses):
    with ScriptedServer(in_turn(fault)) as server:
        found = judge(server, timeout=0.2, retries=1)([CLIP])
    assert found.valid.tolist() == [False]
    assert "timed out: http://127.0.0.1" in caplog.text
    assert len(pauses) == 1


def test_a_server_that_is_not_there_is_masked_and_said_once(caplog):
    with ScriptedServer(in_turn(GOOD)) as server:
        url = server.url
    reward = judge(None, url=url)
    with caplog.at_level(logging.INFO, "rewards"):
        for _ in range(3):
            assert reward([CLIP] * 4).valid.tolist() == [False] * 4
    assert caplog.text.count("such clips are masked") == 1
    assert [r.getMessage() for r in caplog.records if "of 4 calls failed" in r.getMessage()] == [
        f"reward vlm_score: 4 of 4 calls failed; in all: ConnectError {count}" for count in (4, 8, 12)
    ]


def dying(server_of, after):
    """A script that stops its server at request number `after`, which is never answered."""

    def script(request):
        if len(server_of[0].requests) < after:
            return GOOD
        threading.Thread(target=server_of[0].stop).start()
        return hangs

    return script


def test_clips_judged_before_the_server_dies_stay():
    servers = []
    with ScriptedServer(None) as server:
        servers.append(server)
        server.script = dying(servers, after=3)
        found = judge(server, concurrency=1, timeout=20.0, retries=1)([CLIP] * 5)
    assert found.valid.tolist() == [True, True, False, False, False]


def test_a_server_that_comes_back_is_used_again():
    servers = []
    with ScriptedServer(None) as server:
        servers.append(server)

        def script(request):
            if len(server.requests) == 3:
                threading.Thread(target=restart).start()
                return hangs
            return GOOD

        def restart():
            server.stop()
            servers.append(ScriptedServer(in_turn(GOOD), server.port))

        server.script = script
        found = judge(server, concurrency=1, timeout=20.0, retries=8, backoff=0.05)([CLIP] * 5)
    servers[1].stop()
    assert found.total.tolist() == [0.75] * 5
    assert len(server.requests) + len(servers[1].requests) == 6  # the one that was cut off was asked again


def test_no_more_than_so_many_requests_at_once():
    lock, now, most, full = threading.Lock(), [0], [0], threading.Event()

    def counted(handler):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                full.set()
        full.wait(10)  # nobody leaves before three are here
        with lock:
            now[0] -= 1
        GOOD(handler)

    with ScriptedServer(in_turn(counted)) as server:
        reward = judge(server, concurrency=3)
        assert reward([CLIP] * 9).valid.all()
        assert most == [3]
        assert asyncio.run(notebook(reward)).valid.all()  # another event loop, and one that runs already


async def notebook(reward):
    return reward([CLIP] * 4)


def test_event_loops_of_earlier_calls_are_let_go():
    loops = []
    with ScriptedServer(in_turn(GOOD)) as server:
        reward = judge(server, concurrency=1)
        for _ in range(3):
            assert reward([CLIP] * 2).valid.all()
            loops += [weakref.ref(loop) for loop in reward.chat.backend.limits]
    gc.collect()
    assert [loop() is None for loop in loops] == [True, True, False]


def test_a_server_without_log_probabilities_is_named():
    with ScriptedServer(in_turn(says("Yes"))) as server:
        with pytest.raises(RewardError, match="gives no log-probabilities"):
            load("vlm_yes", url=server.url, model="m")([CLIP])
        assert (server.requests[0]["logprobs"], server.requests[0]["top_logprobs"]) == (True, 20)
        assert server.requests[0]["max_tokens"] == 1


@pytest.mark.parametrize("top", [{}, {"top_logprobs": [{"token": "Yes", "logprob": 1000.0}]}])
def test_log_probabilities_that_are_none_fail_the_call(top):
    broken = {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"token": "Yes", **top}]}}]}
    with ScriptedServer(in_turn(sends(200, broken))) as server:
        judge = load("vlm_yes", url=server.url, model="m")
        assert judge([CLIP]).valid.tolist() == [False]
        assert judge.chat.failures == {"unreadable answer": 1}


def test_probability_of_yes_over_an_endpoint():
    answer = says("Yes", [("Yes", {"Yes": -0.5, "no": -1.5, "Maybe": -2.0})])
    with ScriptedServer(in_turn(answer)) as server:
        found = load("vlm_yes", url=server.url, model="m")([CLIP]).total
    assert found.item() == pytest.approx(1 / (1 + np.exp(-1.0)))
