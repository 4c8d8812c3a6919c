"""How often latent rewards rank held-out pairs right, by noise level.

    python -m benchmarks.latent_reward [NAME=]RUN ... --pairs PAIRS.jsonl --out OUT

    python -m alignment.run recipes/tiny_latent_reward.yaml
    python -m alignment.run recipes/tiny_latent_reward.yaml name=tiny_latent_reward_clean algorithm.level_shift=0.02
    python -m benchmarks.latent_reward "all levels=runs/tiny_latent_reward" "clean=runs/tiny_latent_reward_clean" \\
        --pairs runs/tiny_flawed/held_out.jsonl --out benchmarks/results/latent_reward_tiny-world_cpu

Both members of a pair are noised to one level with one noise, the same for all runs. What is shown is the share of the
decided pairs of each dimension whose better member scores higher, with Wilson's 95 % interval; the mean over dimensions
is over pairs decided in one at least. OUT.json holds the numbers, OUT.png a picture, OUT.html a page. Videos that come
without a latent are encoded into a folder beside PAIRS.jsonl.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from alignment.data import Pair
    from alignment.latent_reward import LatentReward

LEVELS = (0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.98)
COLOURS = ("#2563c9", "#e07b16", "#2f9e58", "#a0439a", "#8a93a3")
MEAN = "mean"


def measure(
    reward: LatentReward, pairs: Sequence[Pair], levels: Sequence[float], batch: int, latents: Path
) -> dict[str, list[dict[str, float]]]:
    """Dimension, or mean -> accuracy, low, high and pairs at each level."""
    import torch

    from alignment.latent_reward.accuracy import share
    from alignment.reward_training.data import examples_of

    examples = examples_of(pairs, reward.dimensions)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*reward.dimensions, MEAN)}
    states = states_of(reward, [example.record for example in examples], latents, batch)
    labels = torch.tensor([example.labels[0] for example in examples])
    prompts = [example.record.prompt.text for example in examples]
    for level in levels:
        right = ranked(reward, states, labels, prompts, level, batch)
        columns = dict(zip(reward.dimensions, right.unbind(1), strict=True)) | {MEAN: right.nanmean(1)}
        for name, column in columns.items():
            of = share(column)
            found[name].append({"level": level, "accuracy": of.mean, "low": of.low, "high": of.high, "pairs": of.num})
        print(f"  level {level:.2f}: {found[MEAN][-1]['accuracy']:.3f}", flush=True)
    return found


def ranked(
    reward: LatentReward, states: Tensor, labels: Tensor, prompts: Sequence[str], level: float, batch: int
) -> Tensor:
    """(N, D) 1 where the better member scores higher, 0 where lower, NaN for ties; states (N, 2, ...)."""
    import torch

    from alignment.reward_training.losses import ranked_right
    from samplers import seed_for
    from samplers.rollout import generators

    seeds = [seed_for("latent_reward", level, row) for row in range(len(states))]
    found = []
    for start in range(0, len(states), batch):
        rows = slice(start, start + batch)
        noise = torch.stack([torch.randn(states.shape[2:], generator=g) for g in generators(seeds[rows])])
        noised = ((1 - level) * states[rows] + level * noise[:, None]).flatten(0, 1).to(reward.device)
        with torch.no_grad():
            scores = reward.score(noised, level, [p for p in prompts[rows] for _ in range(2)])
        first, second = scores.cpu().unflatten(0, (-1, 2)).unbind(1)
        found.append(ranked_right(first - second, labels[rows]))
    return torch.cat(found)


def states_of(reward: LatentReward, pairs: Sequence[Pair], folder: Path, batch: int) -> Tensor:
    """(N, 2, ...) clean states of the members, from their latents, or encoded."""
    import torch

    from alignment.data import LatentCache, load_latent

    encoder = reward.encoder(pairs[0].prompt.text)
    members = [member for pair in pairs for member in pair.members]
    videos = {member.video: str(member.video) for member in members if member.latent is None}
    cache = LatentCache(folder, encoder, reward.design.fps) if videos else None
    if cache:
        cache.encode_all(videos, batch)
    shape = encoder.state_shape
    states = [load_latent(m.latent, shape)[0] if m.latent else cache.load(m.video) for m in members]
    return torch.stack(states).float().unflatten(0, (-1, 2))


def picture(runs: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """A panel a dimension, a line a run, over the levels."""
    from benchmarks.pictures import pyplot

    plt = pyplot()
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for colour, (run, found) in zip(COLOURS, runs.items(), strict=False):
            rows = found.get(name, [])
            levels = [row["level"] for row in rows]
            axis.plot(levels, [row["accuracy"] for row in rows], color=colour, marker="o", ms=3, label=run)
            ends = ([row[end] for row in rows] for end in ("low", "high"))
            axis.fill_between(levels, *ends, color=colour, alpha=0.15, lw=0)
        axis.axhline(0.5, color="#1d2330", lw=1, ls="--")
        axis.set(title=name, xlabel="noise level", xlim=(0, 1), ylim=(0.4, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out pairs ranked right")
    axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page_of(record: dict[str, Any], image: Path) -> str:
    """The same as one page: the picture, a table a dimension, and how it was made."""
    from html import escape

    from alignment.gains import percent
    from alignment.report.page import page, section, table

    runs, title = record["runs"], "Latent rewards by noise level"
    picture = base64.b64encode(image.read_bytes()).decode()
    body = f"<h1>{title}</h1>\n"
    body += '<p class="lead">Share of held-out pairs whose better video scores higher, both noised alike.</p>\n'
    body += f'<img src="data:image/png;base64,{picture}" alt="accuracy over noise level" style="width: 100%">\n'
    for name in dict.fromkeys(name for run in runs.values() for name in run):
        columns = {run: dims[name] for run, dims in runs.items() if name in dims}
        rows = []
        for at in zip(*columns.values(), strict=True):
            shares = [f"{percent(x['accuracy'])} ({percent(x['low'])} to {percent(x['high'])})" for x in at]
            rows.append(("", [(f"{at[0]['level']:g}", ""), *((share, "") for share in shares)]))
        body += section(name, table(["noise level", *columns], rows))
    facts = [
        ("", [(name, ""), (str(value), "")]) for name, value in [("date", record["date"]), *record["versions"].items()]
    ]
    body += section("How it was made", f"<pre>{escape(record['command'])}</pre>{table([], facts, 'versions')}")
    return page(title, body)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latent_reward", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--pairs", type=Path, required=True, metavar="PAIRS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="OUT.json, OUT.png and OUT.html")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    parser.add_argument("--batch", type=int, default=16, help="pairs at once (16)")
    options = parser.parse_args(arguments)
    from alignment.errors import exit_code

    return exit_code(lambda: compare(options))


def compare(options: argparse.Namespace) -> None:
    """Measure the runs and write the files. Raises: UserError."""
    from alignment.data import Pair, read_preferences
    from alignment.errors import UserError
    from alignment.latent_reward import LatentReward
    from alignment.startup import quiet_loading
    from alignment.versions import versions
    from benchmarks.pictures import pyplot

    pyplot()  # refuses now what would be missing in the end
    if not all(0 < level <= 1 for level in options.levels) or options.batch < 1:
        raise UserError("--levels: lie above 0, up to 1; --batch: is 1 or more")
    pairs = [record for record in read_preferences(options.pairs, "--pairs") if isinstance(record, Pair)]
    named = [run.rpartition("=")[::2] if "=" in run else (Path(run).name, run) for run in options.runs]
    runs: dict[str, Any] = {}
    quiet_loading()
    with tempfile.TemporaryDirectory() as folder:
        for name, run in named:
            print(name, flush=True)
            reward = LatentReward.load(run)
            reward.cache_embeddings(Path(folder))
            runs[name] = measure(reward, pairs, options.levels, options.batch, options.pairs.with_suffix(".latents"))
    command = " ".join(["python -m benchmarks.latent_reward", *(f'"{run}"' for run in options.runs)])
    record = {
        "command": f"{command} --pairs {options.pairs} --out {options.out}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "runs": runs,
    }
    picture(runs, options.out.with_suffix(".png"))
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".html").write_text(page_of(record, options.out.with_suffix(".png")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
