"""Servers that are busy, slow, killed, stopped or none at all."""

import contextlib
import http.server
import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import torch

from rewards import Clip, RewardError, remote
from rewards.serving.session import LONGEST_RETRY_AFTER, _retry_after
from rewards.serving.wire import encode_clips
from tests.rewards import served_rewards
from tests.rewards.servers import ROOT, health, serving, wait_until

SLOW = f"slow={served_rewards.__file__}:Shows:seconds="


def clips(num):
    """`num` clips of which each has a brightness of its own, exactly a level."""
    return [Clip(torch.full((2, 3, 8, 8), level / 255), "x") for level in range(num)]


def right(scores):
    expected = torch.arange(len(scores.total)) / 255
    torch.testing.assert_close(scores.total, expected, atol=1e-6, rtol=0)
    assert scores.valid.all()


def in_background(call):
    """Start a call; returns a function that waits for its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def result():
        thread.join(120)
        return found[0]

    return result


def test_a_full_queue_is_busy_and_the_client_comes_back(tmp_path):
    gate = tmp_path / "open"
    with serving("--reward", f"{SLOW}0.1,gate={gate}", "--queue", "1", "--batch", "1") as server:
        found = []

        def ask():
            found.append(httpx.post(f"{server.url}/rewards/slow", content=encode_clips(clips(1)), timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(found) >= 3)  # one is scored, one may wait
        assert {response.status_code for response in found} == {503}
        assert found[0].headers["retry-after"] == "1"
        assert found[0].json() == {"error": "reward slow: 1 questions wait already"}
        reward = remote(server.url, "slow", request_mb=0.0003, concurrency=4, patience=60)
        result = in_background(lambda: reward(clips(6)))
        gate.touch()
        right(result())
        assert not reward.failures
        for thread in threads:
            thread.join(60)
        assert found[-1].status_code == 200


def test_killed_and_started_again_during_a_run():
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving("--reward", SLOW + "0.1", "--batch", "1"))
        reward = remote(first.url, "slow", request_mb=0.0003, concurrency=2, patience=100)
        result = in_background(lambda: reward(clips(12)))
        wait_until(lambda: health(first.url, "slow")["questions"] >= 3)
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        second = stack.enter_context(serving("--reward", SLOW + "0", port=first.port))
        scores = result()
        right(scores)  # every clip once, in its place
        assert not reward.failures
        assert 1 <= health(second.url, "slow")["questions"] <= 9


def test_gone_for_good_masks_and_says_so_once(caplog):
    with serving("--reward", SLOW + "0") as server:
        reward = remote(server.url, "slow", request_mb=0.0003, patience=0.5)
        right(reward(clips(3)))
        server.stop(signal.SIGKILL)
    for _ in range(2):
        scores = reward(clips(3))
        assert not scores.valid.any()
        assert scores.total.isnan().all()
    assert set(reward.failures) == {f"{server.url} does not answer: ConnectError All connection attempts failed"}
    assert sum(reward.failures.values()) == 6
    assert len([record for record in caplog.records if record.name == "rewards.remote"]) == 1


def test_sigterm_answers_what_was_asked():
    with serving("--reward", SLOW + "0.2", "--batch", "1") as server:
        rewards = [remote(server.url, "slow", patience=0) for _ in range(4)]
        results = [in_background(lambda reward=reward: reward(clips(1))) for reward in rewards]
        wait_until(lambda: health(server.url, "slow")["waiting"] >= 2)
        assert server.stop(signal.SIGTERM) == 0
        for result in results:
            right(result())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_signal_as_soon_as_it_serves_stops_it():
    with serving("--reward", SLOW + "0") as server:
        assert server.stop(signal.SIGINT) == 0
        assert "Traceback" not in server.log


def test_a_reward_that_does_not_end_does_not_keep_the_server():
    """The time that it has, which is 30 seconds, is one here."""
    code = "import sys, rewards.serve as s; s.STOP_SECONDS = 1; sys.exit(s.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--port", "0", "--reward", SLOW + "60"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split(" at ")[1].strip()
            reward = remote(url, "slow", patience=0)
            result = in_background(lambda: reward(clips(1)))
            wait_until(lambda: health(url, "slow")["busy_seconds"] is not None)
            process.terminate()
            errors = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 1
    assert errors.endswith("error: stopped while scoring: slow\n")
    assert not result().valid.any()


def test_slower_than_the_time_out_is_masked_and_no_longer_waited_for():
    with serving("--reward", SLOW + "0.5", "--batch", "1") as server:
        reward = remote(server.url, "slow", request_mb=0.0003, timeout=0.2, patience=0, concurrency=8)
        scores = reward(clips(4))
        assert not scores.valid.any()
        assert set(reward.failures) == {f"{server.url} does not answer: nothing in 0.2 seconds"}
        wait_until(
            lambda: health(server.url, "slow")["waiting"] == 0 and health(server.url, "slow")["busy_seconds"] is None
        )
        assert health(server.url, "slow")["questions"] < 4  # those that still waited were not scored for nobody


class Script(http.server.BaseHTTPRequestHandler):
    """Answers as `server.script` says, one row a request; the last row stays."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        script = self.server.script
        status, headers, body = script.pop(0) if len(script) > 1 else script[0]
        self.server.asked.append(self.path)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    """Start a server that answers rows of (status, headers, body)."""
    servers = []

    def start(*script):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script)
        server.script, server.asked, server.url = list(script), [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that the client would wait, instead of waiting."""
    import asyncio

    seconds, sleep = [], asyncio.sleep

    async def record(wait):
        seconds.append(wait)
        await sleep(0)

    monkeypatch.setattr("rewards.serving.session.asyncio.sleep", record)
    return seconds


FRAMES = (200, {}, {"indices": [0, 1]})
GOOD = {"total": [0.5], "dims": {"a": [None]}, "dense": [[1, 2.5]], "valid": [True]}


def test_an_answer_is_read(scripted):
    server = scripted(FRAMES, (200, {}, GOOD))
    scores = remote(server.url + "/", "a/b c", scope="clip")(clips(1))
    assert scores.total.tolist() == [0.5]
    assert scores.dims["a"].isnan().all()
    assert scores.dense.tolist() == [[1, 2.5]]
    assert server.asked == ["/rewards/a%2Fb%20c/frames?length=2&fps=16.0", "/rewards/a%2Fb%20c"]


def test_pauses_grow_and_the_servers_wish_is_granted(scripted, pauses):
    busy = [(503, {}, {"error": "x"}), (502, {}, b"<html>"), (504, {}, b""), (503, {"Retry-After": "7"}, b"")]
    server = scripted(FRAMES, *busy, (408, {}, b""), (200, {}, GOOD))
    assert remote(server.url, "a", scope="clip", patience=100)(clips(1)).valid.all()
    assert len(server.asked) == 7
    for pause, longest in zip(pauses, [0.25, 0.5, 1, 7, 4], strict=True):
        assert longest / 2 <= pause <= longest


def test_a_pause_beyond_patience_is_not_begun(scripted, pauses):
    server = scripted(FRAMES, (503, {"Retry-After": "50"}, {"error": "full\nup"}))
    reward = remote(server.url, "a", scope="clip", patience=40)
    assert not reward(clips(1)).valid.any()
    assert list(reward.failures) == [f"{server.url} does not answer: 503 full up"]
    assert pauses == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 3), ("0", 0), ("999999999999", LONGEST_RETRY_AFTER), ("-3", 0), ("soon", 0), ("", 0), ("\u0663", 0)],
)
def test_retry_after_is_bounded(text, seconds):
    assert _retry_after(text) == seconds


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 405, 413, 422])
def test_a_refusal_is_an_error_in_one_line(scripted, status):
    server = scripted(FRAMES, (status, {"Location": "http://127.0.0.1:9/"}, {"error": "because\nof this"}))
    with pytest.raises(RewardError, match=rf"^reward a: {server.url} refuses: {status} because of this$"):
        remote(server.url, "a", scope="clip")(clips(1))
    assert len(server.asked) == 2


BAD_ANSWERS = {
    "no JSON": b"<html>hello</html>",
    "a list": b"[]",
    "NaN": b'{"total": [NaN], "dims": {}, "dense": null, "valid": [true]}',
    "infinite": b'{"total": [1e999], "dims": {}, "dense": null, "valid": [true]}',
    "a huge integer": b'{"total": [' + b"9" * 400 + b'], "dims": {}, "dense": null, "valid": [true]}',
    "deep": b"[" * 100_000,
    "a key too many": {**GOOD, "more": 1},
    "a key too few": {"total": [0.5]},
    "too many": {**GOOD, "total": [0.5, 0.5]},
    "text": {**GOOD, "total": ["0.5"]},
    "a truth for a number": {**GOOD, "total": [True]},
    "a number for a truth": {**GOOD, "valid": [1]},
    "uneven dense": {**GOOD, "dense": [[1], [2]]},
    "dense of text": {**GOOD, "dense": ["ab"]},
    "dims of no lists": {**GOOD, "dims": {"a": 1}},
}


@pytest.mark.parametrize("body", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_of_another_form_is_an_error_in_one_line(scripted, body):
    with pytest.raises(RewardError, match="reward a: ") as error:
        remote(scripted(FRAMES, (200, {}, body)).url, "a", scope="clip")(clips(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body", [b"hello", b"3", {"indices": [2]}, {"indices": [-1]}, {"indices": []}, {"indices": [0.0]}, {}]
)
def test_frames_of_another_form_are_an_error(scripted, body):
    with pytest.raises(RewardError, match="reward a: "):
        remote(scripted((200, {}, body)).url, "a", scope="clip")(clips(1))


@pytest.mark.parametrize("body", [b"hello", {}, {"rewards": ["a"]}, {"rewards": {"a": {"scope": "all"}}}])
def test_a_server_of_something_else_is_an_error(scripted, body):
    with pytest.raises(RewardError, match="reward a: "):
        remote(scripted((200, {}, body)).url, "a")


def test_an_endless_answer_is_cut(scripted, monkeypatch):
    monkeypatch.setattr("rewards.serving.session.LARGEST_ANSWER", 1000)
    with pytest.raises(RewardError, match="more than 1000 bytes"):
        remote(scripted((200, {}, b" " * 5000)).url, "a")
