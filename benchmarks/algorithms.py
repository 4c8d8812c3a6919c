"""Every algorithm that samples, on the tiny world, at equal function evaluations and at equal wall time, several seeds.

    python -m benchmarks.algorithms [key=value ...] --out runs/contest [--recipes tiny_grpo ...] [--seeds 0 1 2]
    python -m benchmarks.algorithms --out runs/contest --report benchmarks/results/algorithms_tiny-world_cpu_2026-11

The first command first measures what an iteration of each recipe costs (have the machine to yourself), then trains each
recipe and seed with a constant learning rate until both budgets are spent, evaluating on the way. It goes on where it
was stopped; several of it, over different recipes, can fill one folder. The second writes REPORT.md, .json and .png.

Equal function evaluations: rows through the denoiser, in rollout and update alike. Equal wall time: as much as
tiny_grpo needs for these; iterations times the seconds of one, as measured at the start, so that a busy machine changes
nothing. Held-out: the recipes' evaluation prompts, with the pipeline's deterministic scheduler. Diversity: the spread
between samples of one prompt, as a share of the base model's, with the weights as plain diffusers loads them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTESTANTS = (
    *("tiny_grpo", "tiny_flow_grpo", "tiny_flow_grpo_fast", "tiny_mix_grpo", "tiny_mix_flash_grpo", "tiny_flash_grpo"),
    *("tiny_guard_grpo", "tiny_dppo_grpo", "tiny_sage_grpo", "tiny_branch_grpo", "tiny_branch_mix_grpo"),
    *("tiny_nft", "tiny_awm", "tiny_vgrpo", "tiny_flow_dpo", "tiny_gapo", "tiny_flow_rwr", "tiny_sft"),
)
EVALUATIONS = 7_000  # function evaluations of one run
POINTS = 5  # held-out evaluations on the way
PROMPTS, SAMPLES = 16, 4  # for diversity


def cost(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Seconds and function evaluations of one iteration."""
    from benchmarks.throughput import measure

    result = measure(f"recipes/{recipe}.yaml", overrides, iterations=3)
    return {"seconds": result["seconds"]["iteration"], "nfe": sum(result["nfe"].values())}


def seconds_budget(prices: dict[str, dict[str, float]]) -> float:
    """The time in which tiny_grpo spends its function evaluations."""
    return EVALUATIONS * prices["tiny_grpo"]["seconds"] / prices["tiny_grpo"]["nfe"]


def contest(
    recipe: str, seed: int, overrides: list[str], prices: dict[str, dict[str, float]], folder: Path
) -> dict[str, Any]:
    """Train one recipe and seed until both budgets are spent, and say what came of it."""
    from alignment.metrics import read_metrics
    from alignment.run import main

    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted contest left
    iterations = math.ceil(max(EVALUATIONS / prices[recipe]["nfe"], seconds_budget(prices) / prices[recipe]["seconds"]))
    settings = {
        "iterations": iterations,
        "evaluation.every": max(1, round(iterations / POINTS)),
        "evaluation.videos": 1,
        "checkpoint.every": iterations,
        "optimizer.decay_from": 1,
        "seed": seed,
        "output": folder,
        "tracker": "null",
    }
    code = main([f"recipes/{recipe}.yaml", *(f"{key}={value}" for key, value in settings.items()), *overrides])
    if code:
        sys.exit(code)
    rows = read_metrics(folder / "metrics.jsonl")
    nfe, curve = 0.0, []
    first = json.loads((folder / "samples/000000/scores.json").read_text("utf-8"))["values"]
    curve.append({"iteration": 0, "nfe": 0.0, **{name: _mean(values) for name, values in first.items()}})
    for row in rows:
        nfe += row["nfe"]
        if "eval/reward/mean" in row:
            held_out = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
            curve.append({"iteration": row["iteration"], "nfe": nfe, **held_out})
    return {
        "recipe": recipe,
        "seed": seed,
        "overrides": overrides,
        "curve": curve,
        "training": [row["reward/mean"] for row in rows],
        "drift": rows[-1]["drift/weights"],
        "diversity": diversity(folder) / diversity(folder, trained=False),
    }


def diversity(run: Path, trained: bool = True) -> float:
    """Root mean square deviation between the videos of one prompt, over prompts and other initial noises."""
    import torch

    from alignment.config import load_recipe
    from alignment.data import read_prompts
    from alignment.policy import as_videos, load_pipeline

    recipe = load_recipe(run / "config.yaml")
    pipe = load_pipeline(recipe.model, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    if trained:
        pipe.load_lora_weights(run / "lora")
    texts = [prompt.text for prompt in read_prompts(recipe.evaluation.prompts)[:PROMPTS] for _ in range(SAMPLES)]
    generators = [torch.Generator().manual_seed(9000 + i) for i in range(len(texts))]
    call = {**recipe.call, "num_inference_steps": recipe.sampler.steps, "output_type": "pt"}
    videos = as_videos(pipe(prompt=texts, generator=generators, **call)[0]).unflatten(0, (PROMPTS, SAMPLES))
    return float(videos.var(1).mean().sqrt())


def at(curve: Sequence[dict[str, float]], axis: str, budget: float, value: str) -> float:
    """A held-out value at a budget, between the two evaluations around it; the last one where the curve ends before."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after[axis] >= budget:
            share = (budget - before[axis]) / (after[axis] - before[axis])
            return before[value] + share * (after[value] - before[value])
    return curve[-1][value]


def summarise(results: list[dict[str, Any]], prices: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """One row a recipe, best first: means and standard deviations over seeds."""
    rows, seconds = [], seconds_budget(prices)
    for recipe in dict.fromkeys(result["recipe"] for result in results):
        runs = [result for result in results if result["recipe"] == recipe]
        price = prices[recipe]
        for result in runs:
            for point in result["curve"]:
                point["seconds"] = point["iteration"] * price["seconds"]
        columns = {
            "equal evaluations": [at(r["curve"], "nfe", EVALUATIONS, "reward/mean") for r in runs],
            "equal time": [at(r["curve"], "seconds", seconds, "reward/mean") for r in runs],
            "best": [max(p["reward/mean"] for p in r["curve"]) for r in runs],
            "training": [_mean(r["training"][-3:]) for r in runs],
            "match": [at(r["curve"], "nfe", EVALUATIONS, "reward/match") - r["curve"][0]["reward/match"] for r in runs],
            "clip": [at(r["curve"], "nfe", EVALUATIONS, "reward/clip") - r["curve"][0]["reward/clip"] for r in runs],
            "valid": [at(r["curve"], "nfe", EVALUATIONS, "reward/motion/valid") for r in runs],
            "diversity": [r["diversity"] for r in runs],
            "drift": [r["drift"] for r in runs],
        }
        rows.append(
            {
                "recipe": recipe,
                "seeds": len(runs),
                "base": _mean([r["curve"][0]["reward/mean"] for r in runs]),
                **price,
                **{name: [_mean(values), _spread(values)] for name, values in columns.items()},
            }
        )
    return sorted(rows, key=lambda row: -row["equal evaluations"][0])


def command(seeds: list[int], overrides: list[str]) -> str:
    """What makes these results again."""
    return " ".join(["python -m benchmarks.algorithms", *overrides, "--seeds", *map(str, seeds)])


def markdown(rows: list[dict[str, Any]], seeds: list[int], overrides: list[str], seconds: float) -> str:
    """The contest as a page."""
    from alignment.versions import versions

    lines = [
        "# Algorithms on the tiny world",
        "",
        f"    {command(seeds, overrides)}",
        "",
        f"{time.strftime('%Y-%m-%d')}. " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".",
        "",
        f"Held-out reward (the base model's is {rows[0]['base']:.3f}) after {EVALUATIONS:,} function evaluations and",
        f"after {seconds:.0f} seconds; mean and, in brackets, standard deviation over seeds. Match and clip are never",
        "trained on: their change at equal evaluations. Training: mean reward of the last three iterations' own",
        "samples. Diversity is a share of the base's.",
        "",
        "| recipe | equal evaluations | equal time | best | training | match | clip | valid | diversity | drift "
        "| evaluations an iteration | seconds an iteration |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        signed = {"match", "clip"}
        names = ("equal evaluations", "equal time", "best", "training", "match", "clip", "valid", "diversity", "drift")
        cells = [f"{row[n][0]:{'+' if n in signed else ''}.3f} ({row[n][1]:.3f})" for n in names]
        lines.append(f"| {row['recipe']} | " + " | ".join(cells) + f" | {row['nfe']:.0f} | {row['seconds']:.2f} |")
    return "\n".join([*lines, ""])


def plot(results: list[dict[str, Any]], seconds: float, path: Path) -> None:
    """Held-out reward over function evaluations and over seconds, mean over seeds, one line a recipe."""
    from benchmarks.pictures import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    names = list(dict.fromkeys(result["recipe"] for result in results))
    for name, colour in zip(names, plt.get_cmap("tab20").colors, strict=False):
        curves = [result["curve"] for result in results if result["recipe"] == name]
        for axis, (key, budget) in zip(axes, (("nfe", EVALUATIONS), ("seconds", seconds)), strict=True):
            xs = [budget * i / 40 for i in range(41)]
            ys = [_mean([at(curve, key, x, "reward/mean") for curve in curves]) for x in xs]
            axis.plot(xs, ys, color=colour, label=name.removeprefix("tiny_"))
    axes[0].set(xlabel="function evaluations", ylabel="held-out reward")
    axes[1].set(xlabel="seconds")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_prices(folder: Path) -> dict[str, dict[str, float]]:
    """What an iteration of each recipe costs."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in (folder / "cost").glob("*.json")}


def report(folder: Path, target: Path) -> str:
    """Write the page, the figures and the plot of all finished runs in `folder`."""
    from alignment.versions import versions

    prices = read_prices(folder)
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/result.json"))]
    rows = summarise(results, prices)
    seeds = sorted({result["seed"] for result in results})
    page = markdown(rows, seeds, results[0]["overrides"], seconds_budget(prices))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".md").write_text(page, "utf-8")
    record = {"command": command(seeds, results[0]["overrides"]), "versions": versions(), "recipes": rows}
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    plot(results, seconds_budget(prices), target.with_suffix(".png"))
    return page


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished ones are kept")
    parser.add_argument("--recipes", nargs="+", default=CONTESTANTS, help="names without .yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", type=Path, help="train nothing: write this page from what is there")
    options = parser.parse_intermixed_args()
    from alignment.errors import exit_code

    if options.report:
        return exit_code(lambda: print(report(options.out, options.report)))
    (options.out / "cost").mkdir(parents=True, exist_ok=True)
    for recipe in dict.fromkeys(["tiny_grpo", *options.recipes]):
        path = options.out / "cost" / f"{recipe}.json"
        if not path.exists():
            path.write_text(json.dumps(cost(recipe, options.overrides)), "utf-8")
    for seed in options.seeds:
        for recipe in options.recipes:
            folder = options.out / f"{recipe}_{seed}"
            if not (folder / "result.json").exists():
                result = contest(recipe, seed, options.overrides, read_prices(options.out), folder)
                (folder / "result.json").write_text(json.dumps(result), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
