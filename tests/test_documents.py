"""What the documents name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
DOCUMENTS += [ROOT / "examples" / "tiny_world" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    modules = set(re.findall(r"python -m ([\w.]+)", text)) - {"venv", "pip"}
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    files = set(re.findall(r"\b(?:recipes|benchmarks|examples|tests|alignment|samplers|rewards)/[\w/.-]+\.\w+", text))
    assert not [name for name in files if not (ROOT / name).exists()]


def test_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "pip install -e . && python -m alignment.run recipes/tiny_grpo.yaml" in text
    assert 'pip install -e ".[test]" && pytest' in text
