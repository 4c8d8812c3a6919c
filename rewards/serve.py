"""Serves rewards over HTTP, so that they run on other devices or machines than what asks them.

    python -m rewards.serve --reward clip:path=checkpoints/clip,device=cuda:1 --reward calm=my_reward.py:calm

A client is `rewards.remote(url, name)`; in a recipe `{use: remote, options: {url: http://127.0.0.1:8000, name: clip}}`.

Anyone who reaches the port may have clips scored, so the server is reached from this machine alone; any other --host
needs a token (--token-env). What goes over the network is not encrypted: put a TLS proxy before it where that matters.
A client may not name a reference file; a reward of your own that opens files named in a clip's meta opens the server's.

SIGTERM and SIGINT let it answer what was asked already, for at most 30 seconds.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from rewards.arguments import above_zero
from rewards.contract import Reward, RewardError, one_line
from rewards.serving.wire import read_token

STOP_SECONDS = 30
MAX_CONNECTIONS = 256


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        token = _token(options.host, options.token_env)
        with _bound(options.host, options.port) as listener:
            rewards = load_rewards(options.reward)
            return serve(rewards, listener, token, options)
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def load_rewards(texts: Sequence[str]) -> dict[str, Reward]:
    """Build the rewards of --reward arguments, once all of them are known to be sound. Raises: RewardError."""
    from rewards.arguments import parse_rewards
    from rewards.loading import check, load

    arguments = parse_rewards(texts)
    for argument in arguments.values():
        check(argument.use, **argument.options)
    rewards = {}
    for name, argument in arguments.items():
        try:
            rewards[name] = load(argument.use, **argument.options)
        except RewardError:
            raise
        except Exception as error:  # what a reward's constructor raises is up to its author
            raise RewardError(f"reward {name}: {type(error).__name__}: {one_line(error)}") from error
    return rewards


def serve(
    rewards: Mapping[str, Reward], listener: socket.socket, token: str | None, options: argparse.Namespace
) -> int:
    """Answer until SIGTERM or SIGINT; the exit code is 0 if nothing that was asked was left unanswered."""
    try:
        import uvicorn

        from rewards.serving.app import Bounds, Service
        from rewards.serving.worker import Worker
    except ImportError as error:
        raise RewardError(f"serving needs starlette and uvicorn: pip install 'reelign[serve]' ({error})") from error

    limits = {"capacity": options.queue, "batch": options.batch, "wait": options.wait_ms / 1000}
    workers = {name: Worker(name, reward, **limits) for name, reward in rewards.items()}
    body = int(options.max_body_mb * 2**20)
    app = Service(workers, token, Bounds(body=body, held=max(4 * body, Bounds().held))).app()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # also holds once uvicorn has stopped and raises the signal again
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    listener.listen()
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"serving {', '.join(rewards)} at {url}", flush=True)
    server.run(sockets=[listener])
    left = [name for name, worker in workers.items() if not worker.close(timeout=1.0)]
    if left:
        print(f"error: stopped while scoring: {', '.join(left)}", file=sys.stderr, flush=True)
        os._exit(1)  # a thread inside a reward's native code could crash an interpreter that takes itself down
    return 0


def _token(host: str, variable: str | None) -> str | None:
    if variable is None:
        if not _is_loopback(host):
            raise RewardError(f"--host {host} is open to other machines; give --token-env VARIABLE, or a loopback host")
        return None
    return read_token(variable)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address that does not listen yet: a port in use is found before weights are read."""
    if not 0 <= port < 2**16:  # some resolvers take it modulo that
        raise RewardError(f"cannot listen at {host} port {port}: ports are 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise RewardError(f"cannot listen at {host} port {port}: {one_line(error)}") from error
    return listener


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help lists the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m rewards.serve", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, size, count = parser.add_argument, above_zero(float), above_zero(int)
    add("--reward", action="append", required=True, metavar="[NAME=]use[:key=value,...]", help="may be given again")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    add("--token-env", metavar="VARIABLE", help="environment variable that holds what clients must know")
    add("--max-body-mb", type=size, default=256, help="largest question (default: 256)")
    add("--queue", type=count, default=32, help="questions that may wait, a reward (default: 32)")
    add("--batch", type=count, default=16, help="clips scored in one call (default: 16)")
    add("--wait-ms", type=size, default=10, help="how long a call waits for more clips (default: 10)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
