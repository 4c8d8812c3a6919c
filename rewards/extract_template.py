"""Write the prompt template of a reward model from its authors' Python file, which is read and never run.

python -m rewards.extract_template PATH/TO/VideoAlign/prompt_template.py --out CHECKPOINT/prompt_template.txt
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from rewards.contract import RewardError

# The strings that make up a template, in order: VideoReward's, HPSv3's.
TEMPLATES = (("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",), ("INSTRUCTION", "prompt_with_special_token"))


def extract(source: Path, names: list[str] | None = None) -> str:
    """Join the string constants `names` of a Python file; by default those of a known template.

    Raises: RewardError where the file is no Python, or lacks them.
    """
    try:
        tree = ast.parse(source.read_text("utf-8"), str(source))
    except OSError as error:
        raise RewardError(f"{source}: cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RewardError(f"{source}: is not a Python file ({error})") from error
    strings = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError):  # a call, or a key that cannot be one
                continue
            if isinstance(value, str):
                strings[node.targets[0].id] = value
    for wanted in [names] if names else TEMPLATES:
        if all(name in strings for name in wanted):
            return "".join(strings[name] for name in wanted)
    listed = " or ".join(" + ".join(wanted) for wanted in ([names] if names else TEMPLATES))
    raise RewardError(f"{source}: holds no string {listed}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.extract_template", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="prompt_template.py of VideoAlign, data_collator_qwen.py of HPSv3")
    parser.add_argument("--out", type=Path, required=True, help="prompt_template.txt beside the weights")
    parser.add_argument("--name", action="append", help="another string constant; several are joined")
    options = parser.parse_args(arguments)
    try:
        template = extract(options.source, options.name)
        new = options.out.with_name(f".{options.out.name}.new")
        new.write_bytes(template.encode("utf-8"))
        new.replace(options.out)
    except (RewardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(template)} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
