"""A server with a token and small bounds, and what strangers send it."""

import json
import pickle
import socket
import threading

import httpx
import pytest
import torch

from rewards import Clip, RewardError, remote
from rewards.serving.wire import encode_clips
from tests.rewards.servers import serving
from tests.rewards.test_remote_wire import HOSTILE, Opens

TOKEN = "a-long-token"
KNOWS = {"Authorization": f"Bearer {TOKEN}"}
MB = 2**20


@pytest.fixture(scope="module")
def server():
    arguments = ["--reward", "sprite_colour", "--token-env", "REWARDS_TEST_TOKEN", "--max-body-mb", "1"]
    with serving(*arguments, env={"REWARDS_TEST_TOKEN": TOKEN}) as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log


@pytest.fixture
def ask(server):
    """Send a request with the token. Afterwards the server still answers a good one."""
    with httpx.Client(base_url=server.url, headers=KNOWS, timeout=20, trust_env=False) as client:
        yield client.request
        assert post(client.request, good()).status_code == 200


def good(prompt="a red circle"):
    return encode_clips([Clip(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), prompt)])


def post(ask, body, **options):
    return ask("POST", "/rewards/sprite_colour", content=body, **options)


def refused(response, *statuses):
    assert response.status_code in statuses
    assert list(response.json()) == ["error"]
    assert response.json()["error"].isprintable()


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_body_of_another_form_is_refused(ask, body):
    refused(post(ask, body), 413 if len(body) > MB else 400)


def test_a_pickle_opens_nothing(ask, tmp_path):
    target = tmp_path / "opened"
    refused(post(ask, pickle.dumps(Opens(target)), headers={"Content-Type": "application/python-pickle"}), 400)
    assert not target.exists()


def test_the_size_that_is_said_is_bounded_before_it_is_read(ask, server):
    with socket.create_connection(("127.0.0.1", server.port), 20) as stranger:
        head = f"POST /rewards/sprite_colour HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        stranger.sendall(f"{head}Content-Length: {2**40}\r\n\r\n".encode() + bytes(1000))
        assert stranger.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_the_size_that_is_sent_is_bounded_where_none_is_said(ask):
    pieces = (bytes(2**16) for _ in range(64))
    refused(post(ask, pieces), 413)


def test_a_large_body_is_refused_in_a_line_that_the_client_sees(ask, server, monkeypatch):
    monkeypatch.setenv("REWARDS_TEST_TOKEN", TOKEN)
    reward = remote(server.url, "sprite_colour", token_env="REWARDS_TEST_TOKEN", patience=5)
    with pytest.raises(RewardError, match="refuses: 413 a body of more than 1 MB; ask about fewer clips at once"):
        reward(torch.rand(1, 100, 3, 256, 256), ["x"])
    assert reward(torch.rand(1, 2, 3, 32, 32), ["x"]).valid.all()


@pytest.mark.parametrize(
    "lie",
    [
        b"POST /rewards/sprite_colour HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /rewards/sprite_colour HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /rewards/sprite_colour HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(ask, server, lie):
    with socket.create_connection(("127.0.0.1", server.port), 20) as stranger:
        stranger.sendall(lie)
        assert stranger.recv(1000)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 401", b"")


def test_a_client_that_leaves_half_way_costs_nothing(ask, server):
    for body in (b"", good()[:100]):
        with socket.create_connection(("127.0.0.1", server.port), 20) as stranger:
            head = f"POST /rewards/sprite_colour HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            stranger.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode() + body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("GET", "/rewards"),
        ("GET", "/rewards/sprite_colour/frames?length=3&fps=8"),
        ("POST", "/rewards/sprite_colour"),
        ("POST", "/rewards/nobody"),
    ],
)
@pytest.mark.parametrize("token", [None, "", "Bearer", "Bearer wrong", TOKEN, f"Bearer {TOKEN}x", "Bearer \xff"])
def test_nothing_is_said_without_the_token(server, method, path, token):
    headers = {} if token is None else {"Authorization": token.encode("latin1")}
    refused(httpx.request(method, server.url + path, headers=headers, content=good() * 20), 401)


@pytest.mark.parametrize("value", [None, "wrong"])
def test_a_client_without_the_token_is_told(server, monkeypatch, value):
    if value:
        monkeypatch.setenv("REWARDS_TEST_TOKEN", value)
    with pytest.raises(RewardError, match="refuses: 401 expected the server's token"):
        remote(server.url, "sprite_colour", token_env=value and "REWARDS_TEST_TOKEN")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/rewards/nobody/frames?length=3&fps=8", 404),
        ("/rewards/../../etc/passwd", 404),
        ("/rewards/%0a%1b", 405),
        ("/docs", 404),
        ("/rewards/sprite_colour/frames", 400),
        ("/rewards/sprite_colour/frames?length=3", 400),
        ("/rewards/sprite_colour/frames?length=3&fps=nan", 400),
        ("/rewards/sprite_colour/frames?length=3&fps=0", 400),
        ("/rewards/sprite_colour/frames?length=0&fps=8", 400),
        ("/rewards/sprite_colour/frames?length=1.5&fps=8", 400),
        ("/rewards/sprite_colour/frames?length=1000000000&fps=8", 400),
        ("/rewards/sprite_colour/frames?length=" + "9" * 5000 + "&fps=8", 400),
    ],
)
def test_paths_that_lead_nowhere(ask, path, status):
    refused(ask("GET", path), status)


def test_unprintable_names_and_prompts_are_only_words(ask):
    refused(ask("POST", "/rewards/%0a%1b%ff", content=good()), 404)
    assert post(ask, good("\x1b[31m \n{}${jndi:x} \U0001f600")).status_code == 200
    surrogate = json.dumps({"prompts": ["\ud800"], "fps": [1], "groups": [0], "meta": [{}]})
    import safetensors.torch

    body = safetensors.torch.save({"0": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, {"clips": surrogate})
    assert post(ask, body).status_code == 200


@pytest.fixture
def tight():
    """Port of a server, in a thread of this process, of little memory and patience."""
    import uvicorn

    from rewards import load
    from rewards.serving.app import Bounds, Service
    from rewards.serving.worker import Worker

    worker = Worker("colour", load("sprite_colour"))
    app = Service({"colour": worker}, None, Bounds(body=20_000, held=30_000, seconds=1.0)).app()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(30)
    assert worker.close(10)


def stalled(port, sent):
    """A connection that says it sends 20000 bytes and sends `sent`."""
    stranger = socket.create_connection(("127.0.0.1", port), 20)
    stranger.sendall(b"POST /rewards/colour HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n" + bytes(sent))
    return stranger


def test_a_body_that_does_not_come_is_not_waited_for(tight):
    with stalled(tight, 100) as stranger:
        assert stranger.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_what_is_held_in_all_is_bounded_and_given_back(tight):
    with stalled(tight, 15_000), stalled(tight, 14_000):
        for _ in range(1000):
            response = httpx.post(f"http://127.0.0.1:{tight}/rewards/colour", content=good())
            if response.status_code == 503:
                break
        assert response.json() == {"error": "0.0286102 MB of questions are held already"}
        assert response.headers["retry-after"] == "1"
    for _ in range(1000):
        response = httpx.post(f"http://127.0.0.1:{tight}/rewards/colour", content=good())
        if response.status_code == 200:
            return
    raise AssertionError(response.text)
