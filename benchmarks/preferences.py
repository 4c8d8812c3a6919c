"""Preference methods on the tiny world, from data made by the commands: what each gains, and which pairs cost motion.

    python -m benchmarks.preferences --out runs/preferences [--seeds 0 1 2]
    python -m benchmarks.preferences --out runs/preferences --report benchmarks/results/preferences_tiny-world_cpu

Three questions.

    methods   Pairs labelled by the verifiable reward (speed and direction of the sprite). Flow-DPO, GAPO, Flow-RWR and
              SFT learn from the best and the worst of four samples of each prompt, DenseDPO from pairs that start from
              one real clip each, SePPO from real clips of fast sprites. Does the held-out reward rise?
    motion    Pairs labelled by a judge who likes what changes little from frame to frame and nothing else: two samples
              of a prompt from independent noise, against two that start from one real clip, with one label a pair or
              one for each half second. All have as many pairs and updates. How much of the speed is left?
    quality   The same with a judge who likes good shapes, and slow ones a little more, as people who look for flaws do:
              what DenseDPO (arXiv 2506.03517) says of its pairs, that they teach quality and keep motion.

The first command makes the data and trains (some 40 minutes on two cores); what is finished is kept, so it goes on
where it was stopped. The second writes REPORT.md and .json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

CALM, LOOKS = (f"{Path(__file__).resolve()}:{judge}" for judge in ("calm", "looks"))
HELD_OUT = 32  # pairs of each file that are never trained on
BUDGET = ["iterations=60", "algorithm.batch_size=16", "optimizer.lr=5e-4", "optimizer.decay_from=0.5"]
VALUES = {  # columns of a question's table: what they are called, and what evaluations call them
    "methods": {"motion": "reward/motion", "match": "reward/match", "clip": "reward/clip"},
    "motion": {"calm": "reward/calm", "speed": "reward/motion/speed", "match": "reward/match"},
    "quality": {
        "looks": "reward/looks",
        "shape": "reward/shape",
        "speed": "reward/motion/speed",
        "match": "reward/match",
    },
}
TITLES = {
    "methods": "Does the reward rise?",
    "motion": "A judge of motion alone: which pairs cost motion?",
    "quality": "A judge of quality with a liking for slow motion: which pairs cost motion?",
}


def calm(videos, prompts):
    """1 minus five times the mean absolute change from frame to frame; videos (N, F, C, H, W) in [0, 1]."""
    return 1 - 5 * videos.diff(dim=1).abs().mean((1, 2, 3, 4))


def looks(videos, prompts):
    """How well the sprite has the named shape, in [0, 1], less a fifth of its speed in px a frame."""
    from rewards import Clip
    from rewards.sprite import measure, sprite_shape

    clips = [Clip(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    return sprite_shape()(clips).total - 0.2 * measure(videos).speed


class Data(NamedTuple):
    """How a preference file is made: arguments of the two commands."""

    generate: list[str]
    annotate: list[str]


class Arm(NamedTuple):
    """One way to learn, and what it learns from."""

    question: str
    recipe: str
    data: str


BY_MOTION, BY_CALM, BY_LOOKS = (["--reward", judge] for judge in ("sprite_motion", CALM, LOOKS))
HALVES = ["--segments", "0.5"]
GUIDED = ["--guided", "CLIPS"]
DATA = {
    "sampled": Data(["--candidates", "4"], [*BY_MOTION, "--select", "best_worst"]),
    "guided": Data(GUIDED, [*BY_MOTION, *HALVES]),
    "calm_sampled": Data(["--candidates", "2"], [*BY_CALM, "--select", "best_worst"]),
    "calm_guided": Data(GUIDED, BY_CALM),
    "calm_guided_halves": Data(GUIDED, [*BY_CALM, *HALVES]),
    "looks_sampled": Data(["--candidates", "2"], [*BY_LOOKS, "--select", "best_worst"]),
    "looks_guided": Data(GUIDED, BY_LOOKS),
    "looks_guided_halves": Data(GUIDED, [*BY_LOOKS, *HALVES]),
}
ARMS = {
    "flow_dpo": Arm("methods", "tiny_flow_dpo", "sampled"),
    "gapo": Arm("methods", "tiny_gapo", "sampled"),
    "dense_dpo": Arm("methods", "tiny_dense_dpo", "guided"),
    "flow_rwr": Arm("methods", "tiny_flow_rwr", "sampled"),
    "sft": Arm("methods", "tiny_sft", "sampled"),
    "seppo": Arm("methods", "tiny_seppo", "fast"),
    "independent": Arm("motion", "tiny_flow_dpo", "calm_sampled"),
    "guided": Arm("motion", "tiny_flow_dpo", "calm_guided"),
    "guided, by half second": Arm("motion", "tiny_dense_dpo", "calm_guided_halves"),
    "looks: independent": Arm("quality", "tiny_flow_dpo", "looks_sampled"),
    "looks: guided": Arm("quality", "tiny_flow_dpo", "looks_guided"),
    "looks: guided, by half second": Arm("quality", "tiny_dense_dpo", "looks_guided_halves"),
}


def make_data(name: str, folder: Path) -> Path:
    """Clips, pairs and labels by the commands; the preference file. What is there is kept."""
    from alignment import annotate, generate

    if name == "fast":
        return clips(folder / "fast", "--speed", "quickly")
    data = DATA[name]
    guided = data.generate == GUIDED
    made = folder / ("made_guided" if guided else "made_" + data.generate[-1])
    arguments = [str(clips(folder / "clips")) if word == "CLIPS" else word for word in data.generate]
    out = folder / f"{name}.jsonl"
    if not out.exists():
        run(generate.main, ["recipes/tiny_flow_dpo.yaml", *arguments, "--out", str(made), "tracker=null"])
        run(annotate.main, [str(made / "index.jsonl"), *data.annotate, "--out", str(out)])
    return out


def clips(folder: Path, *options: str) -> Path:
    """Real clips of the tiny world."""
    from examples.tiny_world.clips import make

    if not (folder / "prompts.jsonl").exists():
        make(["--out", str(folder), *options])
    return folder


def run(command: Any, arguments: list[str]) -> None:
    if code := command(arguments):
        sys.exit(code)


def split(path: Path) -> tuple[Path, Path]:
    """The file without its last pairs, and these alone."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    parts = path.with_suffix(".train.jsonl"), path.with_suffix(".held_out.jsonl")
    for part, rows in zip(parts, (lines[:-HELD_OUT], lines[-HELD_OUT:]), strict=True):
        part.write_text("".join(rows), "utf-8")
    return parts


def train(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One arm and seed: paired changes over held-out prompts, and how many held-out pairs are told apart."""
    from alignment.metrics import read_metrics
    from benchmarks.seeds import run_seed

    arm = ARMS[name]
    path = make_data(arm.data, folder)
    train_on, held_out = (path, None) if path.is_dir() else split(path)
    data = [f"data.preferences={train_on}", "data.prompts=null"]
    if arm.recipe in ("tiny_flow_dpo", "tiny_gapo", "tiny_dense_dpo"):
        data.append(f"data.held_out={held_out}")
    judges = {"calm": CALM, "looks": LOOKS, "shape": "sprite_shape"}
    rewards = [f"rewards.{n}.{field}" for n, judge in judges.items() for field in (f"use={judge}", "weight=0")]
    output = folder / "runs" / file_name(name, seed)
    result = run_seed(f"recipes/{arm.recipe}.yaml", [*BUDGET, *data, *rewards], seed, output)
    rows = read_metrics(output / "metrics.jsonl")
    gain = result["gains"]["motion"]
    return {
        "arm": name,
        "seed": seed,
        "nfe": result["nfe"],
        "pairs": sum(1 for _ in train_on.open()) if train_on.is_file() else None,
        "valid": gain.validity.after,
        "area": gain.area_ratio,
        "held_out": rows[-1].get("eval/pairs/implicit_accuracy"),
        "winner": rows[-1].get("error/winner"),
        "loser": rows[-1].get("error/loser"),
        "changes": {n: [c.before, c.after, c.change, c.z] for n, c in result["changes"].items()},
    }


def file_name(arm: str, seed: int) -> str:
    return f"{'_'.join(re.findall(r'[a-z_]+', arm))}_{seed}"


def report(folder: Path, target: Path) -> str:
    """Write the page and the figures of all finished runs."""
    from alignment.versions import versions

    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("results/*.json"))]
    seeds = sorted({result["seed"] for result in results})
    command = f"python -m benchmarks.preferences --seeds {' '.join(map(str, seeds))}"
    lines = [
        "# Preference methods on the tiny world",
        "",
        f"    {command}",
        "",
        f"{time.strftime('%Y-%m-%d')}. " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".",
        "",
        "60 updates of 16 examples each, LoRA, lr 5e-4. Means over seeds of values on 128 held-out prompts; z of each",
        "seed's paired change. Told apart: share of held-out pairs that the policy tells apart better than the base.",
        "Winner, loser: errors over the base's, of the last update.",
    ]
    for question, columns in VALUES.items():
        ends = ("valid", "area", "told apart", "winner", "loser")
        head = ["arm", *(word for column in columns for word in (column, "z")), *ends]
        lines += ["", f"## {TITLES[question]}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm in (name for name in ARMS if ARMS[name].question == question):
            if runs := [result for result in results if result["arm"] == arm]:
                lines.append(row(arm, columns.values(), runs))
    page = "\n".join([*lines, ""])
    target.with_suffix(".md").write_text(page, "utf-8")
    record = {"command": command, "versions": versions(), "runs": results}
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return page


def row(arm: str, columns: Iterable[str], runs: list[dict[str, Any]]) -> str:
    """One line of a table."""
    cells = [arm]
    for column in columns:
        changes = [run["changes"][column] for run in runs]  # before, after, change, z
        cells.append(f"{changes[0][0]:.3f} to {mean([after for _, after, *_ in changes]):.3f}")
        cells.append(", ".join(f"{z:.1f}" for *_, z in changes))
    for key in ("valid", "area", "held_out", "winner", "loser"):
        known = [run[key] for run in runs if run[key] is not None]
        cells.append(f"{mean(known):.3f}" if known else "")
    return f"| {' | '.join(cells)} |"


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of data and runs; what is finished is kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--report", type=Path, help="train nothing: write this page from what is there")
    options = parser.parse_args()
    if options.report:
        print(report(options.out, options.report))
        return 0
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm in options.arms:
            path = options.out / "results" / f"{file_name(arm, seed)}.json"
            if not path.exists():
                path.write_text(json.dumps(train(arm, seed, options.out)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
