"""Where an iteration's time goes: seconds and function evaluations by phase, for any recipe.

    python -m benchmarks.throughput recipes/tiny_grpo.yaml [key=value ...] [--iterations 3] [--out result.json]

The first iteration warms up and is not counted. `rest` is what lies outside the four phases; `overhead` is what is
neither denoiser (forward and backward), nor VAE, nor rewards, wherever it lies.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.training import Run

PHASES = ("rollout", "decode", "reward", "update", "rest")


def measure(recipe: str, overrides: list[str], iterations: int) -> dict[str, Any]:
    """Run a few iterations in a temporary folder and return medians by phase."""
    import torch

    from alignment.check import check_recipe
    from alignment.config import load_recipe
    from alignment.distributed import Processes
    from alignment.metrics import read_metrics
    from alignment.run import prepare, train
    from alignment.versions import versions

    with tempfile.TemporaryDirectory() as folder:
        quiet = ["evaluation.num_prompts=1", "evaluation.videos=1", "tracker=null", f"iterations={iterations + 1}"]
        loaded = load_recipe(recipe, [*overrides, *quiet, f"output={folder}"])
        processes = Processes(cpu=loaded.model.device == "cpu")
        check_recipe(loaded, processes.count)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        session = prepare(loaded, processes)
        with denoiser_seconds(session) as denoiser:
            train(session)
        session.close()
        rows = read_metrics(Path(folder) / "metrics.jsonl")[1:]
    seconds = {phase: statistics.median(row[f"time/{phase}"] for row in rows) for phase in PHASES[:-1]}
    whole = statistics.median(row["time/iteration"] for row in rows)
    seconds["rest"] = statistics.median(
        row["time/iteration"] - sum(row[f"time/{phase}"] for phase in PHASES[:-1]) for row in rows
    )
    arithmetic = statistics.median(denoiser[row["iteration"]] + row["time/decode"] + row["time/reward"] for row in rows)
    result = {
        "command": f"python -m benchmarks.throughput {recipe} {' '.join(overrides)}".strip(),
        "versions": versions(),
        "iterations": len(rows),
        "seconds": {**seconds, "iteration": whole, "overhead": whole - arithmetic},
        "samples_per_second": statistics.median(row["samples_per_second"] for row in rows),
        "nfe": {key: statistics.median(row[f"nfe/{key}"] for row in rows) for key in ("rollout", "update")},
    }
    if torch.cuda.is_available():
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


@contextlib.contextmanager
def denoiser_seconds(session: Run) -> Iterator[dict[int, float]]:
    """Seconds in the denoisers' forward passes and in backward, by iteration."""
    import torch

    from alignment.policy import synchronize
    from samplers.rollout import patched

    spent: dict[int, float] = defaultdict(float)

    def timed(function: Callable) -> Callable:
        @functools.wraps(function)  # pipelines look at the signature of forward
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronize(session.policy.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(session.policy.device)
            if session.completed < session.iteration:  # not in the evaluations between iterations
                spent[session.iteration] += time.perf_counter() - start
            return result

        return wrapped

    with contextlib.ExitStack() as stack:
        for denoiser in session.policy.denoisers.values():
            stack.enter_context(patched(denoiser, "forward", timed))
        stack.enter_context(patched(torch.autograd, "backward", timed))
        yield spent


def table(result: dict) -> str:
    """The result as text."""
    whole = result["seconds"]["iteration"]
    lines = [f"{'phase':10}{'seconds':>10}{'share':>8}{'evaluations':>14}"]
    for phase in PHASES:
        spent = result["seconds"][phase]
        count = f"{result['nfe'][phase]:.0f}" if phase in result["nfe"] else ""
        lines.append(f"{phase:10}{spent:10.3f}{spent / whole:8.1%}{count:>14}")
    lines.append(f"{'iteration':10}{whole:10.3f}{'':8}{sum(result['nfe'].values()):14.0f}")
    overhead = result["seconds"]["overhead"]
    lines.append(f"overhead, neither denoiser nor VAE nor rewards: {overhead:.3f} s, {overhead / whole:.1%}")
    lines.append(f"{result['samples_per_second']:.2f} samples a second")
    if "peak_memory_gib" in result:
        lines.append(f"peak memory {result['peak_memory_gib']:.1f} GiB")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    options = parser.parse_intermixed_args()
    from alignment.errors import UserError

    try:
        result = measure(options.recipe, options.overrides, options.iterations)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
