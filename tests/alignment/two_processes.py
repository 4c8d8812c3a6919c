"""Two processes on one machine (gloo, CPU), for tests that compare them with one."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from alignment.distributed import Processes


def joined(rank: int, port: int) -> Processes:
    """What a worker calls first: this process among the two. Global seeds differ, and nothing may depend on them."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    processes = Processes(cpu=True)
    torch.manual_seed(rank)
    return processes


def spawned(worker: Callable[[int, Path, int], None], folder: Path) -> None:
    """Run worker(rank, folder, port) in two processes until both are done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (folder, port), nprocs=2)
