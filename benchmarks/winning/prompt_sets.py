"""Prompt sets that published win rates are told on: VideoAlign's three, or a file of the user's own.

The sets belong to their authors and are not part of this repository: `benchmarks/prompts/README.md` says how to get
them. They are English there with Chinese translations, which are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from alignment.data import Prompt, read_prompts
from alignment.errors import UserError, one_line

FOLDER = Path(__file__).parents[1] / "prompts"
VBENCH_INFO = "VBench_full_info.json"  # optional: which of VBench's dimensions each prompt is for


class PromptSet(NamedTuple):
    file: str  # its name in VideoAlign's datasets/video_eval_prompts
    num: int


# Source: github.com/KwaiVGI/VideoAlign, datasets/video_eval_prompts/README.md at 219ab9d.
SETS = {
    "vbench": PromptSet("vbench.csv", 946),  # VBench's prompts, rewritten at length; the originals are "prompt_shorter"
    "ta_hard": PromptSet("TA_hard.csv", 72),
    "videogen_eval": PromptSet("videogen_eval.csv", 400),  # rewritten, too
}


def prompt_set(name_or_path: str) -> list[Prompt]:
    """Read a published set by its name, or a .txt, .jsonl or .csv file.

    Prompts of "vbench" and "videogen_eval" have meta["prompt_shorter"], the original that was rewritten; those of
    "vbench" have meta["dimensions"], a list, where VBench's own file lies beside the set.

    Raises: UserError, one line: no such set or file, a set that was not fetched yet or is cut short, bad rows.
    """
    if name_or_path not in SETS:
        if not Path(name_or_path).expanduser().is_file():
            raise UserError(f"--prompts: {name_or_path!r} is neither a file nor one of {', '.join(SETS)}")
        return read_prompts(name_or_path, "--prompts")
    file, num = SETS[name_or_path]
    path = FOLDER / file
    if not path.is_file():
        raise UserError(f"--prompts {name_or_path}: no {path}; {FOLDER / 'README.md'} says how to get it")
    prompts = read_prompts(path, f"--prompts {name_or_path}")
    if len(prompts) != num:
        raise UserError(f"--prompts {name_or_path}: {path} holds {len(prompts)} prompts, not {num}; copy it again")
    prompts = [p._replace(meta={k: v for k, v in p.meta.items() if k != "prompt_zh"}) for p in prompts]
    return _with_dimensions(prompts) if name_or_path == "vbench" else prompts


def _with_dimensions(prompts: list[Prompt]) -> list[Prompt]:
    """VBench lists its prompts in the order of the set; two of them stand there twice, for different dimensions."""
    path = FOLDER / VBENCH_INFO
    if not path.is_file():
        return prompts
    try:
        rows = [(row["prompt_en"], list(row["dimension"])) for row in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--prompts vbench: {path} is not VBench's list of prompts: {one_line(error)}") from error
    if [text for text, _ in rows] != [p.meta.get("prompt_shorter") for p in prompts]:
        raise UserError(
            f"--prompts vbench: the prompts of {path} are not those of the set; copy it again, or delete it"
        )
    return [p._replace(meta=p.meta | {"dimensions": dims}) for p, (_, dims) in zip(prompts, rows, strict=True)]
