"""Real reward servers in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


class Server:
    """A running `python -m rewards.serve`: its `url`, its process and the lines that it has said."""

    def __init__(self, process):
        self.process, self.lines = process, []
        line = process.stdout.readline()
        assert " at http://" in line, process.stderr.read()
        self.url = line.split(" at ")[1].strip()
        self.port = int(self.url.rpartition(":")[2])
        self.reader = threading.Thread(target=lambda: self.lines.extend(process.stderr), daemon=True)
        self.reader.start()  # a full pipe would stop the server

    @property
    def log(self):
        return "".join(self.lines)

    def stop(self, number=signal.SIGTERM, timeout=40):
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self.reader.join(10)
        return code


def start(*arguments, port=0, env=None):
    """Start a server, without waiting for it."""
    command = [sys.executable, "-m", "rewards.serve", "--port", str(port), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@contextlib.contextmanager
def serving(*arguments, port=0, env=None):
    """A server that answers, killed at the end."""
    process = start(*arguments, port=port, env=env)
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        server = Server(process)
        timer.cancel()
        yield server
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def health(url, name):
    """What the server says of a reward."""
    return httpx.get(f"{url}/health", timeout=30).json()["rewards"][name]


def wait_until(claim, seconds=60):
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, f"waited {seconds} seconds in vain"
        time.sleep(0.01)
