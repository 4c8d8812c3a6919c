"""Clips a second that a served reward scores for one and for several clients, beside the same reward in process.

    python -m benchmarks.serve_throughput --reward clip:path=examples/tiny_world/clip [--out result.json]

The server and every client are processes of their own on this machine, so that they share its cores; all talk over
loopback. Each client scores the same random clips in some calls; its first warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rewards import Clip, Reward

CLIENTS = (1, 4)
COUNTS = ("questions", "calls")


class Load(NamedTuple):
    """What each client asks."""

    calls: int
    clips: int  # a call
    frames: int
    size: int  # pixels a side


def measure(text: str, load: Load, server_options: Sequence[str], numbers: Sequence[int] = CLIENTS) -> dict[str, Any]:
    """Clips a second in process and by number of clients."""
    from alignment.versions import versions
    from rewards.arguments import parse_reward
    from rewards.loading import load as load_reward

    argument = parse_reward(text)
    busy = os.getloadavg()[0]  # of others: a machine that works on something else gives lower rates
    rates = {"in process": rate([timed(load_reward(argument.use, **argument.options), load)], load)}
    questions_per_call = {}
    command = [sys.executable, "-m", "rewards.serve", "--port", "0", "--reward", text, *server_options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if " at http://" not in line:
                raise SystemExit(2)  # it has said why
            url = line.rpartition(" at ")[2].strip()
            for num in numbers:
                name, before = f"{num} client{'s' * (num > 1)}", counts(url, argument.name)
                rates[name] = rate(clients(num, url, argument.name, load), load)
                rise = {key: value - before[key] for key, value in counts(url, argument.name).items() if key in COUNTS}
                questions_per_call[name] = rise["questions"] / rise["calls"]
        finally:
            server.terminate()
    return {
        "command": " ".join(["python -m benchmarks.serve_throughput", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "versions": versions(),
        "load": load._asdict(),
        "machine": {"cores": os.cpu_count(), "load_average_before": round(busy, 2)},
        "clips_per_second": rates,
        "questions_per_call": questions_per_call,
    }


def clients(num: int, url: str, name: str, load: Load) -> list[tuple[float, float]]:
    """Begin and end of the calls of `num` processes that begin together."""
    spawn = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    start = spawn.Barrier(num)
    with spawn.Pool(num, initializer=_keep, initargs=(start,)) as pool:
        return pool.starmap(_client, [(url, name, load)] * num, chunksize=1)


def _keep(barrier: Barrier) -> None:
    global start
    start = barrier


def _client(url: str, name: str, load: Load) -> tuple[float, float]:
    from rewards import remote

    return timed(remote(url, name), load, start)


def timed(reward: Reward, load: Load, start: Barrier | None = None) -> tuple[float, float]:
    """Begin and end of the calls, on the machine's clock."""
    clips = random_clips(load)
    reward(clips)
    if start is not None:
        start.wait(120)
    begin = time.monotonic()
    for _ in range(load.calls):
        if not reward(clips).valid.all():
            raise RuntimeError("not every clip has a score")
    return begin, time.monotonic()


def random_clips(load: Load) -> list[Clip]:
    import torch

    from rewards import Clip

    shape = (load.clips, load.frames, 3, load.size, load.size)
    return [Clip(video, "a red circle") for video in torch.rand(shape, generator=torch.Generator().manual_seed(0))]


def rate(spans: Sequence[tuple[float, float]], load: Load) -> float:
    """Clips a second from the first begin to the last end."""
    return len(spans) * load.calls * load.clips / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def counts(url: str, name: str) -> dict[str, int]:
    import httpx

    return httpx.get(f"{url}/health", trust_env=False).json()["rewards"][name]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    whole = result["clips_per_second"]["in process"]
    lines = [f"{'':12}{'clips/s':>10}{'relative':>10}{'questions a call':>18}"]
    for name, clips in result["clips_per_second"].items():
        shared = result["questions_per_call"].get(name)
        lines.append(f"{name:12}{clips:10.1f}{clips / whole:10.2f}{'' if shared is None else f'{shared:.2f}':>18}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, metavar="[NAME=]use[:key=value,...]")
    parser.add_argument("--calls", type=int, default=20, help="calls a client (default: 20)")
    parser.add_argument("--clips", type=int, default=8, help="clips a call (default: 8)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default: 128)")
    parser.add_argument("--batch", type=int, default=32, help="clips that the server scores in one call (default: 32)")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    options = parser.parse_args()
    from rewards import RewardError

    load = Load(options.calls, options.clips, options.frames, options.size)
    try:
        result = measure(options.reward, load, ["--batch", str(options.batch)])
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
