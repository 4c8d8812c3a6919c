"""A reward is hacked, and four guards are held against it, on the tiny world.

    python examples/reward_hacking.py [--quick] [--out runs/reward_hacking]

`fast`, the function below, pays for speed and for nothing else. It is trained twice, plainly and with a KL penalty, and
everything is judged by rewards that are never trained on. The plain run is then looked at in three more ways: as it was
at the best held-out score on its way, and with the base model taking the last steps of the sampling. One table, four
minutes on one core. Needs the repository: it reads recipes/ and examples/tiny_world.

Result (one seed, 96 held-out prompts): speed alone doubles, and 55 % of the sprites are lost. With KL, or stopped at
the peak of the held-out match, it rises by a quarter and no sprite is lost. With the base model in the last four of
eight steps it rises by half, and none is lost; with the base model in the last step alone, half of them are.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import fmean

from rewards.sprite import measure

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {  # a heading of the table and what a run's evaluations call it
    "fast": "reward/fast",
    "px/frame": "reward/motion/speed",
    "valid": "reward/match/valid",
    "match": "reward/match",
    "clip": "reward/clip",
    "area": "reward/match/area",
}
SHARES = (0.8, 0.5)
SETTINGS = ["iterations=12", "optimizer.lr=3e-3", "optimizer.decay_from=1", "tracker=null"]  # a rate that overshoots
SETTINGS += ["evaluation.every=3", "evaluation.num_prompts=96", "evaluation.videos=2"]
QUICK = ["iterations=1", "algorithm.prompts_per_iteration=2", "algorithm.group_size=2", "evaluation.every=1"]
QUICK += ["evaluation.num_prompts=4", "evaluation.videos=1"]


def fast(videos, prompts, limit: float = 4.0):
    """Speed of the sprite, 1 at `limit` px a frame; videos: (N, F, 3, H, W) in [0, 1].

    Which way it moves, whether it keeps its shape and whether there still is a sprite does not count. The data knows
    0.4 to 1.5 px a frame, so that all of the range above is out of reach of honest videos.
    """
    return (measure(videos).speed / limit).clamp(max=1)


def trained(folder, *overrides):
    """The recipe of the tiny world, with this reward, in Python: what `python -m alignment.run` does."""
    from alignment.check import check_recipe
    from alignment.config import load_recipe
    from alignment.distributed import Processes
    from alignment.run import prepare, train

    hacked = [f"rewards.fast.use={__file__}:fast", "rewards.fast.weight=1", "rewards.motion.weight=0"]
    recipe = load_recipe("recipes/tiny_grpo.yaml", [*hacked, *overrides, f"output={folder}"])
    check_recipe(recipe)
    recipe.folder.mkdir(parents=True)
    run = prepare(recipe, Processes(cpu=True))
    try:
        train(run)
    finally:
        run.close()
    return run


def with_the_base_model(run, share, folder):
    """Evaluate the trained weights in the first `share` of the steps only; in the others the base model samples."""
    run.recipe.evaluation.trained_share, run.folder = share, folder
    run.evaluate(run.completed)


def evaluations(folder):
    """Iteration -> means of an evaluation, by heading; every one has the same prompts and the same initial noise."""
    found = {}
    for path in sorted(folder.glob("samples/*/scores.json")):
        values = json.loads(path.read_text("utf-8"))["values"]
        means = {h: fmean(v for v in values[name] if v is not None) for h, name in COLUMNS.items()}
        found[int(path.parent.name)] = means
    return found


def table(rows):
    lines = [" " * 44 + "".join(f"{heading:>10}" for heading in COLUMNS)]
    lines += [f"{name:44}" + "".join(f"{means[heading]:10.3f}" for heading in COLUMNS) for name, means in rows.items()]
    return "\n".join(lines)


def main(out, settings):
    print(
        "1. Speed alone. Lines that begin with alarm or warning are guard one, the toolkit's look at held-out rewards."
    )
    run = trained(out / "plain", *settings)
    print("\n2. The same with guard two, a KL penalty that holds the policy close to the base model.")
    trained(out / "kl", *settings, "algorithm.kl=0.1")
    print("\n3. The first run's weights with guard three: the base model takes over after a share of the steps.")
    for share in SHARES:
        with_the_base_model(run, share, out / f"share_{share}")
    print(
        "\n4. Guard four, an early stop where a held-out reward was best: what `evaluation.watch=match` does with some"
    )
    print("`evaluation.patience` does so. The trained reward itself still rises when all is lost.")

    on_the_way, with_kl = evaluations(out / "plain"), evaluations(out / "kl")
    last, peak = max(on_the_way), max(on_the_way, key=lambda iteration: on_the_way[iteration]["match"])
    rows = {
        "base model": on_the_way[0],
        f"plain, {last} iteration{'s' * (last > 1)}": on_the_way[last],
        f"plain, stopped at the peak of match ({peak})": on_the_way[peak],
        "with KL": with_kl[max(with_kl)],
        **{f"plain in the first {s:.0%} of the steps": evaluations(out / f"share_{s}")[last] for s in SHARES},
    }
    print(f"\n{table(rows)}\n")
    print(f"`fast` is trained on, the others are not. Videos: {out}/*/samples; reports: {out}/*/report.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny iteration: shows that it runs, hacks nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reward_hacking")
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists():
        raise SystemExit(f"{out} exists; remove it, or say --out FOLDER")
    os.chdir(ROOT)  # the recipe's paths start there
    main(out, SETTINGS + (QUICK if options.quick else []))
