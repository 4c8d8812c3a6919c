"""The page for voting: its videos, and the HTML around them. How it looks and acts is in the .html and .js beside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.report.page import page
from rewards.contract import RewardError
from rewards.video_files import read_video

MIN_SIDE = 256  # pixels; smaller videos are enlarged by whole factors, with hard edges


def encode(video: Path, out: Path) -> Path:
    """Write a video as every browser plays it: H.264, 4:2:0, at least MIN_SIDE pixels. Raises: UserError."""
    import imageio.v3 as iio

    try:
        frames, fps = read_video(video)
    except RewardError as error:
        raise UserError(str(error)) from error
    times = math.ceil(MIN_SIDE / min(frames.shape[-2:]))
    if times > 1:
        frames = frames.repeat_interleave(times, -2).repeat_interleave(times, -1)
    height, width = (side // 2 * 2 for side in frames.shape[-2:])  # 4:2:0 halves both sides
    pixels = frames[..., :height, :width].permute(0, 2, 3, 1).numpy()
    encoding = {"codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 1}
    iio.imwrite(out, pixels, fps=fps, output_params=["-crf", "18", "-movflags", "+faststart"], **encoding)
    return out


def render(data: Mapping[str, Any]) -> str:
    """The page around what it shows: {page, embedded, comparisons: [{prompt, left, right}]}."""
    here = Path(__file__)
    body = here.with_name("voting_page.html").read_text("utf-8")
    # "<" cannot end the script element then, nor begin a comment in it.
    text = json.dumps(data).replace("<", "\\u003c")
    script = here.with_name("voting_page.js").read_text("utf-8")
    whole = f'{body}\n<script type="application/json" id="data">{text}</script>\n<script>\n{script}</script>'
    return page("Which video is better?", whole)
