"""Sample a clip twice from the SDE with an ordinary diffusers pipeline, and see the log-probability of every step.

    python examples/sample_with_log_probs.py [PIPELINE_FOLDER] [--prompt TEXT] [--size HEIGHT WIDTH FRAMES]

Both samples start from the same noise. Prints a line a step (its noise's std, the log-probability of either sample, how
far apart they are) and writes them side by side to samples.mp4. The default folder is the tiny world's base model.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

from samplers import rollout, sde_scheduler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", default=Path(__file__).parent / "tiny_world" / "base", type=Path)
parser.add_argument("--prompt", default="a red circle moving left on a black background")
parser.add_argument("--size", nargs=3, type=int, default=[32, 32, 9], metavar=("HEIGHT", "WIDTH", "FRAMES"))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--noise-level", type=float, default=0.7)
parser.add_argument("--out", default="samples.mp4")
options = parser.parse_args()
if not (options.folder / "model_index.json").exists():
    raise SystemExit(f"{options.folder} is not a diffusers pipeline folder (it has no model_index.json)")

pipe = DiffusionPipeline.from_pretrained(options.folder)
pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=options.noise_level)
call = dict(zip(("height", "width", "num_frames"), options.size, strict=True), num_inference_steps=options.steps)
with torch.no_grad():
    steps = range(options.steps - 1)  # the last step is deterministic
    sampled = rollout(pipe, steps, [0, 0], [1, 2], prompt=[options.prompt] * 2, output_type="pt", **call)

print("step      std  log-prob of both   spread")
for step in sampled.trajectory.steps:
    first, second = step.log_prob.tolist()
    print(f"{step.index:4d} {step.step.std:8.4f} {first:8.4f} {second:8.4f} {step.x_next.std(0).mean():8.4f}")
frames = torch.cat(list(sampled.frames), dim=-1).float().permute(0, 2, 3, 1).cpu().numpy()  # (F, H, 2 W, 3)
print(
    f"std between the two clips: {sampled.frames.std(0).mean():.4f}; wrote {export_to_video(list(frames), options.out)}"
)
