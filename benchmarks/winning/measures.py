"""What is measured on videos without a judge: pictures, motion, and how far the samples of a prompt lie apart.

S samples of a prompt, F frames, H W pixels
"""

from __future__ import annotations

import math

from torch import Tensor

from rewards import image_statistics

from .motion import Flow, flow_magnitude, is_dynamic

MEASURES = "measures"
DIVERSITY, FLOW, DYNAMIC = "diversity", "flow", "dynamic_degree"
WORDS = {  # what is shown, in this order
    DIVERSITY: "diversity of a prompt's samples",
    DYNAMIC: "dynamic degree, share of videos",
    FLOW: "longest optical flow, px in 1/8 s",
    "motion": "change from frame to frame",
    "brightness": "brightness",
    "saturation": "saturation",
    "edge_density": "edge density",
    "colour_entropy": "colour entropy, bits",
}


def measure(films: Tensor, fps: float, flow: Flow) -> list[dict[str, float | None]]:
    """Measures of the videos of one prompt, one row a video.

    `diversity` is that of all of them together, in [0, 1]: the root mean square distance of a pixel from its mean over
    the samples (of freedom S - 1), as in benchmarks.algorithms; None of a single sample. The rest is named in
    rewards.image_statistics and in motion.py.

    Args:
        films: (S, F, 3, H, W) in [0, 1].
    """
    pictures = image_statistics(films)
    together = math.sqrt(float(films.var(0).double().mean())) if len(films) > 1 else None
    rows = []
    for i, film in enumerate(films):
        longest = flow_magnitude(film, fps, flow)
        moves = {
            DYNAMIC: float(is_dynamic(longest, fps, min(film.shape[-2:]))),
            FLOW: float(longest.double().mean()) if len(longest) else 0.0,
        }
        rows.append({DIVERSITY: together, **moves, **{name: float(values[i]) for name, values in pictures.items()}})
    return rows
