"""The command: python -m rewards.list [NAME] [--json]

Without NAME: all rewards that are known by name, what each looks at, gives and needs, and how it was verified.
With NAME: all of one, and its options. Exit codes: 0 done, 2 no such reward.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from difflib import get_close_matches
from typing import Any

from rich.console import Console
from rich.table import Table

from rewards.known import KNOWN, Known


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.list", description="List the rewards known by name.")
    parser.add_argument("name", nargs="?", help="show all of one reward, with its options")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.name is not None and options.name not in KNOWN:
        near = get_close_matches(options.name, KNOWN, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"error: no reward is called {options.name}{hint}; known: {', '.join(KNOWN)}", file=sys.stderr)
        return 2
    if options.name is None:
        rows = {name: row._asdict() for name, row in KNOWN.items()}
        print(json.dumps(rows, indent=2)) if options.json else Console(markup=False).print(_overview())
        return 0
    row, options_of = KNOWN[options.name], _options(KNOWN[options.name])
    if options.json:
        print(json.dumps({**row._asdict(), "options": options_of}, indent=2))
    else:
        _print_details(options.name, row, options_of)
    return 0


def _overview() -> Table:
    table = Table(show_lines=True)
    table.add_column("reward", no_wrap=True)
    for heading in ("looks at, gives, scale", "weights", "verified"):
        table.add_column(heading, overflow="fold")
    for name, row in sorted(KNOWN.items()):
        number = f"{row.inputs}\n-> {row.outputs}\nscale: {row.scale}"
        weights = "none" if row.memory == "none" else f"{row.memory}\n{row.licence}"
        table.add_row(name, number, weights, row.verified)
    return table


def _print_details(name: str, row: Known, options: dict[str, str]) -> None:
    facts = {"name": name, **row._asdict(), **{f"option {option}": text for option, text in options.items()}}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, text in facts.items():
        table.add_row(label, text)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(f"\n{inspect.getdoc(_target(row)) or '(not documented)'}")
    needed = [f"{option}=..." for option, text in options.items() if text.endswith("required")]
    reward = name + (f":{','.join(needed)}" if needed else "")
    console.print(f"\n  python -m rewards.score --reward {reward} --videos clips/ --prompts prompts.txt")


def _options(row: Known) -> dict[str, str]:
    """Option -> its type and default, as the signature has them."""
    return {p.name: _in_words(p) for p in inspect.signature(_target(row)).parameters.values()}


def _in_words(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return "further ones, see below"
    kind = "" if parameter.annotation is parameter.empty else f"{parameter.annotation}, "
    return kind + ("required" if parameter.default is parameter.empty else f"default {parameter.default!r}")


def _target(row: Known) -> Any:
    module, _, attribute = row.target.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
