"""What an iteration of BranchGRPO costs beside DanceGRPO's, in the setting of its paper (arXiv 2509.06040, table 1).

    python -m benchmarks.branch_cost [--iterations 3] [--out benchmarks/results/branch_cost_cpu.json]

20 denoising steps, 16 leaves or samples a prompt, three prompts, splits after steps 0, 3, 6 and 9, every step but the
last trained, on the tiny world. All settings are measured in one run. The paper's own ratios of seconds, on FLUX with
16 H200: branches .71, with either pruning .45, Mix .21, MixGRPO .41.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

SETTING = ["sampler.steps=20", "algorithm.prompts_per_iteration=3"]
TREE = "algorithm.splits=[0,3,6,9]"
SETTINGS = {
    "DanceGRPO": ("tiny_grpo", ["algorithm.group_size=16", "algorithm.trained_steps=null"]),
    "MixGRPO, window of 5": ("tiny_mix_grpo", ["algorithm.group_size=16", "algorithm.window.size=5"]),
    "BranchGRPO": ("tiny_branch_grpo", [TREE, "algorithm.prune=none"]),
    "BranchGRPO, width pruned": ("tiny_branch_grpo", [TREE, "algorithm.prune=parent_top1"]),
    "BranchGRPO, depth pruned": ("tiny_branch_grpo", [TREE, "algorithm.prune=depth"]),
    "BranchGRPO-Mix": ("tiny_branch_mix_grpo", [TREE, "algorithm.window.size=4"]),
}


def compare(iterations: int, overrides: list[str] | None = None) -> dict[str, Any]:
    """Seconds and function evaluations of an iteration of each, and their ratios to the first."""
    from benchmarks.throughput import measure

    results = {}
    for name, (recipe, own) in SETTINGS.items():
        found = measure(f"recipes/{recipe}.yaml", [*SETTING, *own, *(overrides or [])], iterations)
        seconds = found["seconds"]
        results[name] = {
            "evaluations, rollout": found["nfe"]["rollout"],
            "evaluations, update": found["nfe"]["update"],
            "seconds": seconds["iteration"],
            "seconds, rollout and update": seconds["rollout"] + seconds["update"],
        }
    first = results["DanceGRPO"]
    # A backward pass costs about two forward passes.
    for row in results.values():
        row["cost by evaluations"] = _passes(row) / _passes(first)
        row["cost by seconds"] = row["seconds, rollout and update"] / first["seconds, rollout and update"]
    return {
        "command": " ".join(["python -m benchmarks.branch_cost", *(overrides or []), f"--iterations {iterations}"]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": found["versions"],
        "iterations": iterations,
        "settings": results,
    }


def _passes(row: dict[str, float]) -> float:
    return row["evaluations, rollout"] + 3 * row["evaluations, update"]


def table(result: dict[str, Any]) -> str:
    """The ratios as text."""
    lines = [f"{'':28}{'rollout':>9}{'update':>9}{'seconds':>9}{'cost':>8}{'cost':>9}"]
    lines.append(f"{'':28}{'eval.':>9}{'eval.':>9}{'':>9}{'(eval.)':>8}{'(seconds)':>9}")
    for name, row in result["settings"].items():
        lines.append(
            f"{name:28}{row['evaluations, rollout']:9.0f}{row['evaluations, update']:9.0f}{row['seconds']:9.2f}"
            f"{row['cost by evaluations']:8.2f}{row['cost by seconds']:9.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every setting")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    result = compare(options.iterations, options.overrides)
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
