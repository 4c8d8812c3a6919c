"""Who may import whom, and that samplers/ knows no model. Read from the syntax trees, without importing anything."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"samplers", "rewards", "alignment"}
FAMILY_NAMES = re.compile(
    r"Wan(?!dering)|Hunyuan|LTX|Mochi|Flux|SD3|StableDiffusion|Sana|SkyReels|Kandinsky|Qwen|Lumina|Chroma|Pipeline"
    r"|Transformer[23]D|Autoencoder|UNet"
)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute dotted names of what a file imports, function-level imports included."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(("package", "allowed"), [("samplers", {"samplers"}), ("rewards", {"rewards"})])
def test_packages_stand_alone(package, allowed):
    assert files(package)
    for path in files(package):
        ours = {name.split(".")[0] for name in imported(path)} & PACKAGES
        assert ours <= allowed, f"{path.name} imports {ours - allowed}"


def test_algorithms_do_not_import_each_other():
    algorithms = ROOT / "alignment" / "algorithms"
    for path in algorithms.glob("*.py"):
        if path.name == "__init__.py":
            continue
        others = {f"alignment.algorithms.{p.stem}" for p in algorithms.glob("*.py")} - {
            f"alignment.algorithms.{path.stem}"
        }
        assert not imported(path) & others, path.name


def words(path: Path) -> list[str]:
    """Identifiers and string constants, docstrings left out."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(node.value)
        found += [getattr(node, field) for field in ("id", "attr", "name", "arg") if isinstance(node, ast.AST)
                  and isinstance(getattr(node, field, None), str)]  # fmt: skip
    return found


def test_samplers_name_no_model():
    """Diffusers' scheduler classes may be named (CogVideoX has two of its own); pipelines and networks may not."""
    for path in files("samplers"):
        named = [word for word in words(path) if FAMILY_NAMES.search(word) and not word.endswith("Scheduler")]
        assert named == [], path.name


def test_the_checks_see_what_they_look_for(tmp_path, monkeypatch):
    """On a file that breaks every rule."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    bad = tmp_path / "alignment" / "algorithms" / "imagined.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "def f():\n    from . import grpo\n    from .. import config\n    import samplers\n    WanPipeline()\n"
    )
    expected = {"alignment.algorithms.grpo", "alignment.config", "samplers"}
    assert expected <= imported(bad)
    assert [word for word in words(bad) if FAMILY_NAMES.search(word)] == ["WanPipeline"]
    assert not FAMILY_NAMES.search("wan_linear")
