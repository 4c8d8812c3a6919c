"""Prompt templates: text with places for the prompt and for frames.

{prompt} must appear. Frames are put where {video} stands (or {video_1} and {video_2}, {reference}); a template that
names none of these gets all frames first and then its text, as published judges do. Other braces are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards.contract import RewardError
from rewards.judges.chat import Frame

FOLDER = Path(__file__).with_name("templates")
MAX_CHARACTERS = 200_000


def load_template(name: str, path: str | None, default: str, places: Sequence[str], texts: Sequence[str] = ()) -> str:
    """Read a template file, or the default one of the package.

    Args:
        name: the reward's, for messages.
        places: where frames go; a template names all of them or none.
        texts: what else than prompt must appear.
    Raises: RewardError, one line.
    """
    file = FOLDER / default if path is None else Path(path)
    text = read_text(name, "template", file)
    missing = [place for place in ("prompt", *texts) if f"{{{place}}}" not in text]
    named = [place for place in places if f"{{{place}}}" in text]
    missing += [place for place in places if named and place not in named]
    if missing:
        raise RewardError(f"reward {name}: template {file} lacks {', '.join(f'{{{place}}}' for place in missing)}")
    return text


def read_text(name: str, option: str, file: str | Path) -> str:
    """The text of a file that an option names. Raises: RewardError, one line."""
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"reward {name}: {option} {file} cannot be read: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise RewardError(f"reward {name}: {option} {file} has {len(text)} characters, expected a text of a few pages")
    return text


def render(template: str, texts: Mapping[str, str], frames: Mapping[str, Sequence[Frame]]) -> tuple[str | Frame, ...]:
    """The parts of a message: texts and frames, in order.

    Args:
        texts: place -> text; what it contains is not looked at again.
        frames: place -> the frames shown there. The places are in the order of templates that name none.
    """
    if not any(f"{{{place}}}" in template for place in frames):
        template = "".join(f"{{{place}}}" for place in frames) + template
    parts: list[str | Frame] = []
    for index, piece in enumerate(re.split(r"(\{\w+\})", template)):
        place = piece[1:-1] if index % 2 else ""  # texts and what is in braces take turns
        if place in frames:
            parts.extend(frames[place])
        elif piece:
            text = texts.get(place, piece)
            if parts and isinstance(parts[-1], str):
                parts[-1] += text
            else:
                parts.append(text)
    return tuple(parts)
