"""The run report's videos: the same prompts before and after training, side by side, embedded in the page."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..gains import finite, first_and_last, number

MAX_PAIRS = 8  # embedded; the rest is in the run folder
MAX_BYTES = 24 * 2**20  # of all embedded videos together, before base64 makes them a third larger
TINY = 128  # pixels of width below which a video is enlarged with hard edges

Evaluation = Mapping[str, Any]


def video_pairs(evaluations: Sequence[Evaluation]) -> tuple[str, str]:
    """The first prompts' videos (HTML) and a note that says which they are; "" where there are none."""
    if not evaluations:
        return "", ""
    last = evaluations[-1]
    shown = list(first_and_last(evaluations) or [last])
    num = min(min(len(e.get("videos", [])), len(e.get("prompts", []))) for e in shown)
    titles = ["before", "after"] if len(shown) == 2 else [f"iteration {last['iteration']}"]
    cards, room = [], MAX_BYTES
    for i in range(min(num, MAX_PAIRS)):
        files = [_file(e, i) for e in shown]
        room -= sum(file.stat().st_size for file in files if file.is_file())
        if room < 0:
            break
        clips = "".join(_clip(title, e, i, file) for title, e, file in zip(titles, shown, files, strict=True))
        prompt = escape(str(last["prompts"][i]))
        cards.append(f'<div class="pair">{clips}<p title="{prompt}">{prompt}</p></div>')
    if not num:
        return "", ""
    note = f"The first {len(cards)} of {len(last['prompts'])} evaluation prompts, not selected; same noise for both"
    if len(shown) == 1:
        note = f"The first {len(cards)} of {len(last['prompts'])} evaluation prompts, not selected"
    note += "; with each its reward." if "reward/mean" in last["values"] else "."
    if num > len(cards):
        note += f" {num - len(cards)} more in samples/{_file(last, 0).parent.name}/ of the run folder."
    return f'<div class="grid-of pairs">{"".join(cards)}</div>', note


def _file(evaluation: Evaluation, index: int) -> Path:
    return Path(evaluation["folder"]) / Path(str(evaluation["videos"][index])).name  # nothing outside the run


def _clip(title: str, evaluation: Evaluation, index: int, file: Path) -> str:
    scores = evaluation["values"].get("reward/mean", [])
    score = number(scores[index]) if index < len(scores) and finite(scores[index]) else ""
    return clip(title, score, file)


def clip(title: str, score: str, file: Path) -> str:
    """An embedded video with a line of plain words below."""
    below = f"<div><span>{escape(title)}</span><b>{escape(score)}</b></div>"
    if not file.is_file():
        missing = escape(f"{file.parent.name}/{file.name} is missing")
        return f'<div class="clip"><div class="missing">{missing}</div>{below}</div>'
    data = file.read_bytes()
    tiny = ' class="tiny"' if 0 < video_width(data) < TINY else ""
    source = base64.b64encode(data).decode("ascii")
    video = f'<video{tiny} autoplay loop muted playsinline src="data:video/mp4;base64,{source}"></video>'
    return f'<div class="clip">{video}{below}</div>'


def video_width(mp4: bytes) -> int:
    """Width in pixels from the track header of an mp4 file (ISO 14496-12, 8.3.2), 0 if there is none."""
    at = mp4.find(b"tkhd") + 4
    if at < 4 or len(mp4) <= at:
        return 0
    offset = at + (88 if mp4[at] == 1 else 76)  # version 1 has 64-bit times
    return struct.unpack_from(">I", mp4, offset)[0] >> 16 if len(mp4) >= offset + 4 else 0
