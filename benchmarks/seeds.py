"""One recipe over several seeds: what it gained on held-out prompts, and what the gain is made of.

    python -m benchmarks.seeds recipes/tiny_grpo.yaml [key=value ...] [--seeds 0 1 2] [--out benchmarks/results/NAME.md]

A seed is the run's: prompts, initial noise and step noise of training differ, held-out prompts and their seeds do not.
The judge is the recipe's own rewards, on videos from the pipeline's deterministic scheduler, before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST = "ratio/first_deviation"  # algorithms without a log-ratio have none


def run_seed(recipe: str, overrides: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train one seed in `folder` and return its gain and diagnostics."""
    from alignment.gains import compare, decompose
    from alignment.metrics import read_metrics
    from alignment.run import main

    start = time.perf_counter()
    code = main([recipe, *overrides, f"seed={seed}", f"output={folder}", "tracker=null"])
    if code:
        sys.exit(code)
    seconds = time.perf_counter() - start
    before, after = (json.loads(path.read_text()) for path in _first_and_last(folder / "samples"))
    rows = read_metrics(folder / "metrics.jsonl")
    changes = compare(before, after)
    return {
        "seed": seed,
        "seconds": seconds,
        "nfe": sum(row["nfe"] for row in rows),
        "first_deviations": [row[FIRST] for row in rows if FIRST in row],
        "gains": {name: decompose(before, after, name) for name in before["trained"]},
        "changes": {name: change for name, change in changes.items() if not name.startswith("image/")},
        "image": {name: change for name, change in changes.items() if name.startswith("image/")},
        "held_out": before["held_out"],
    }


def markdown(recipe: str, overrides: list[str], results: list[dict[str, Any]]) -> str:
    """The results as a page: one table of gains, one of every value."""
    from alignment.versions import versions

    command = f"python -m benchmarks.seeds {recipe} {' '.join(overrides)}".strip()
    seeds = " ".join(str(r["seed"]) for r in results)
    lines = [
        f"# {Path(recipe).stem}: seeds {seeds}",
        "",
        f"    {command} --seeds {seeds}",
        "",
        f"{time.strftime('%Y-%m-%d')}. " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".",
        "",
        "Changes are paired over held-out prompts, after minus before; in brackets standard error and z. Given valid:",
        "over the prompts whose video is valid before and after.",
        "",
        "| seed | reward | before | after | change | given valid | valid | area ratio | evaluations | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, gain in result["gains"].items():
            total = gain.total if gain else result["changes"][f"reward/{name}"]
            valid = f"{gain.validity.before:.3f} to {gain.validity.after:.3f}" if gain else "not reported"
            given = _change(gain.both_valid) if gain else "not reported"
            area = f"{gain.area_ratio:.3f}" if gain and gain.area_ratio else "not reported"
            cells = [result["seed"], name, f"{total.before:.3f}", f"{total.after:.3f}", _change(total), given, valid]
            cells += [area, f"{result['nfe']:.0f}", f"{result['seconds']:.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    names = list(results[0]["changes"]) + list(results[0]["image"])
    lines += [
        "",
        "| value | " + " | ".join(f"seed {r['seed']}" for r in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name in names:
        cells = [{**r["changes"], **r["image"]}[name] for r in results]
        lines.append(f"| {name} | " + " | ".join(f"{c.before:.3f} {_change(c)}" for c in cells) + " |")
    held = ", ".join(results[0]["held_out"]) or "none"
    drift = [value for r in results for value in r["first_deviations"]]
    said = f" Largest |log-ratio| before an update: {max(drift):.1e}." if drift else ""
    lines += ["", f"Never trained on: {held}.{said}", ""]
    return "\n".join(lines)


def _change(paired: Any) -> str:
    if paired.num == 0 or math.isnan(paired.change):
        return "none"
    return f"{paired.change:+.3f} ({paired.stderr:.3f}, {paired.z:.1f})"


def _first_and_last(samples: Path) -> tuple[Path, Path]:
    found = sorted(samples.glob("*/scores.json"))
    return found[0], found[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="where to write the page; printed in any case")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            run_seed(options.recipe, options.overrides, seed, Path(folder) / str(seed)) for seed in options.seeds
        ]
    page = markdown(options.recipe, options.overrides, results)
    print(page)
    if options.out:
        options.out.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
