"""The full loop on the tiny world: from labelled pairs to a generator, a reward model, alignment, a stranger's opinion.

    python -m examples.full_loop [--quick] [--out runs/full_loop] [--votes FILE]

1. Pairs of videos with planted flaws, as footage is: a generator fine-tuned on them, which makes such flaws itself, and
   a VideoReward trained on them; how many held-out pairs it ranks right.
2. GRPO and Flow-DPO against that reward, from that generator.
3. Win rates of both over it, from the same noise: by the trained reward, and by judges that neither has seen. One page
   to look at, and a blind one to vote on.

Hardware: two CPU cores, 25 minutes. Result, one run: the reward ranks 97.6 % of the held-out pairs right; GRPO wins
86 % of the pairs against the generator by that reward, and 71, 79 and 83 % by the three strangers; Flow-DPO 76, and 68,
69 and 82 % (benchmarks/results/win_rate_full-loop_tiny-world_cpu_2026-11.json). Three seeds of each raise that reward
by 2.5, 2.0 and 1.9 (GRPO), 1.5, 1.4 and 1.5 (Flow-DPO), from -3.1 (benchmarks/results/full-loop-*.md).

Each part is a command of the toolkit that goes on where it was stopped, so the same call goes on, too. To be called
from the repository's folder, since recipes name files from there, after `pip install -e ".[benchmarks]"`.
"""

import argparse
import shutil
from pathlib import Path

WORLD = "examples/tiny_world"
REWARD = "rewards.video_reward"
MORE_PAIRS = ["algorithm.prompts_per_iteration=12", "algorithm.group_size=8", "algorithm.updates_per_rollout=2"]
RUNS = {
    "grpo": ["tiny_mix_flash_grpo"],
    "flow_dpo": ["tiny_flow_dpo", "iterations=40", "optimizer.lr=1e-3", *MORE_PAIRS],
}
STRANGERS = {"smoothness": "sprite_smoothness", "match": "sprite_match", "clip": f"clip:path={WORLD}/clip"}
PAIRS = {"train": [], "held_out": ["--close", "--num", 288, "--seed", 1]}
QUICK_REWARD = ["iterations=1", "algorithm.batch_size=4", "algorithm.norm_videos=4"]
QUICK_RUN = ["iterations=1", "algorithm.prompts_per_iteration=1", "algorithm.group_size=2", "evaluation.num_prompts=2"]
QUICK_RUN += ["evaluation.videos=1"]


def call(command, *arguments):
    """Run a command of the toolkit. Where it fails, it has said why in one line."""
    if code := command([str(argument) for argument in arguments]):
        raise SystemExit(code)


def train(recipe, folder, *overrides):
    """`python -m alignment.run`, from the beginning or from where it was stopped."""
    from alignment.run import main

    call(main, f"recipes/{recipe}.yaml", f"output={folder}", "tracker=null", *overrides, "--resume")


def make_pairs(out, quick):
    """Pairs with flaws of every kind, and held-out pairs that are one small flaw apart; their folder."""
    from examples.tiny_world import flawed_videos

    for name, how in PAIRS.items():
        if not (out / "pairs" / f"{name}.jsonl").exists():
            call(flawed_videos.make, "--out", out / "pairs" / f"{name}.jsonl", *how, *(["--num", 8] if quick else []))
    return out / "pairs"


def train_base(out, pairs, quick):
    """The tiny world's generator, fine-tuned on the better-looking clip of each pair; its folder."""
    settings = [f"data.preferences={pairs}/train.jsonl", "data.prompts=null", "algorithm.dimension=VQ"]
    settings += ["algorithm.batch_size=32", "model.trained=full", "optimizer.lr=3e-4", "iterations=120"]
    train("tiny_sft", out / "sft", *settings, *(QUICK_RUN if quick else []))
    shutil.copytree(f"{WORLD}/base", out / "base", dirs_exist_ok=True)
    shutil.copytree(out / "sft" / "transformer", out / "base" / "transformer", dirs_exist_ok=True)
    return out / "base"


def train_reward(out, pairs, quick):
    """A VideoReward, measured on the held-out pairs; its folder."""
    from benchmarks import reward_accuracy

    data = [f"data.preferences={pairs}/train.jsonl", f"data.held_out={pairs}/held_out.jsonl"]
    train("tiny_reward_model", out / "reward_model", *data, *(QUICK_REWARD if quick else []))
    folder = out / "reward_model" / "reward"
    rewards = {"trained": f"video_reward:path={folder}", **STRANGERS}
    asked = [word for name, reward in rewards.items() for word in ("--reward", f"{name}={reward}")]
    kept = ["--cache", out / "scores"]
    call(reward_accuracy.main, "--data", pairs / "held_out.jsonl", *asked, "--out", out / "accuracy", *kept)
    return folder


def tune(out, base, reward, quick):
    """GRPO (its fastest kind) and Flow-DPO against the reward; name -> run folder."""
    prompts = [f"data.prompts={WORLD}/prompts/train_speed.txt", f"evaluation.prompts={WORLD}/prompts/heldout_speed.txt"]
    settings = [f"{REWARD}.use=video_reward", f"{REWARD}.options.path={reward}", f"{REWARD}.weight=1", *prompts]
    settings += ["rewards.motion.weight=0", f"model.path={base}"]
    for name, (recipe, *own) in RUNS.items():
        train(recipe, out / name, *settings, *own, *(QUICK_RUN if quick else []))
    return {name: out / name for name in RUNS}


def compare(out, base, reward, runs, quick, votes=()):
    """Win rates over the base, by the trained reward and by strangers; the folder of the pages."""
    from benchmarks import win_rate

    judges = {"trained": f"video_reward:path={reward}", **STRANGERS}
    asked = [word for name, judge in judges.items() for word in ("--judge", f"{name}={judge}")]
    asked += [word for name, run in runs.items() for word in ("--tuned", f"{name}={run}")]
    asked += [word for file in votes for word in ("--votes", file)]
    asked += ["--limit", 2] if quick else ["--limit", 96, "--samples", 2]
    prompts = f"{WORLD}/prompts/heldout_speed.txt"
    call(win_rate.main, "--base", base, "--prompts", prompts, *asked, "--out", out / "comparison")
    return out / "comparison"


def main(out, quick, votes=()):
    from benchmarks.pictures import pyplot

    pyplot()  # refuses now what would be missing in the end
    print("1. A generator that learns flaws, so that its rewards fall, and a reward model that sees them.", flush=True)
    pairs = make_pairs(out, quick)
    base = train_base(out, pairs, quick)
    reward = train_reward(out, pairs, quick)
    print("\n2. GRPO and Flow-DPO against the reward.", flush=True)
    runs = tune(out, base, reward, quick)
    print("\n3. Both against the generator: by their reward, and by judges that neither has seen.", flush=True)
    pages = compare(out, base, reward, runs, quick, votes)
    print(f"\nThe reward's accuracy: {out}/accuracy/accuracy.html; win rates: {pages}/index.html")
    print(f"To vote blind: {pages}/voting.html; export the votes, then call this again with --votes FILE")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small step of everything: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/full_loop"))
    parser.add_argument("--votes", type=Path, nargs="+", default=[], help="what the blind page has exported")
    options = parser.parse_args()
    from alignment.errors import exit_code

    raise SystemExit(exit_code(lambda: main(options.out, options.quick, options.votes), stops=(OSError,)))
