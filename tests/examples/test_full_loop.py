"""The full loop runs from pairs to pages."""

import json
from pathlib import Path

import pytest

from alignment.config import load_recipe
from examples import full_loop

NAME = "diffusion_pytorch_model.safetensors"
ROOT = Path(full_loop.__file__).parents[1]


def test_one_small_step_of_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    full_loop.main(tmp_path, quick=True)
    result = json.loads((tmp_path / "comparison/result.json").read_text("utf-8"))
    assert list(result["comparisons"]) == ["grpo", "flow_dpo"]
    for comparison in result["comparisons"].values():
        relations = {name: judge["relation"] for name, judge in comparison["judges"].items()}
        assert relations == {"trained": "trained on", **dict.fromkeys(full_loop.STRANGERS, "independent")}
    made, base = ((tmp_path / folder / "transformer" / NAME).read_bytes() for folder in ("sft", "base"))
    assert made == base
    for run in result["comparisons"]:
        assert load_recipe(tmp_path / run / "config.yaml").model.path == str(tmp_path / "base")
    said = capsys.readouterr().out
    for page in ("comparison/index.html", "comparison/voting.html", "accuracy/accuracy.html"):
        assert (tmp_path / page).is_file()
        assert f"{tmp_path}/{page}" in said
    with pytest.raises(SystemExit) as refused:  # called again, it trains nothing, and hands the votes on
        full_loop.main(tmp_path, quick=True, votes=[tmp_path / "none.json"])
    assert refused.value.code == 2
    assert "none.json" in capsys.readouterr().err
