"""Recipes: every mistake is one line that names the key; the file that a run saves is a recipe again."""

import subprocess
import sys

import pytest
import yaml

from alignment.config import EMAConfig, load_recipe, save_recipe
from alignment.errors import UserError
from tests.alignment.conftest import REPOSITORY


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_of_the_file_and_of_overrides(write):
    loaded = load_recipe(write(), ["model.lora.rank=8", "call.height=32", "rewards.contrast.weight=0.5"])
    assert loaded.model.lora.rank == 8
    assert loaded.model.lora.alpha == 4
    assert loaded.call["height"] == 32
    assert loaded.call["width"] == 16
    assert loaded.trained_rewards == {"bright": 1.0, "contrast": 0.5}
    assert loaded.algorithm.group_size == 2
    assert loaded.ema == EMAConfig()


@pytest.mark.parametrize("text", ["3e-3", "0.003", "3.0e-3", "3E-3"])
def test_numbers_in_every_notation(write, text):
    path = write()
    assert load_recipe(path, [f"optimizer.lr={text}"]).optimizer.lr == 0.003
    path.write_text(path.read_text().replace("lr: 0.01", f"lr: {text}"))
    assert f"lr: {text}" in path.read_text()
    assert load_recipe(path).optimizer.lr == 0.003


def test_free_values_become_numbers_too(write):
    loaded = load_recipe(write(), ["call.guidance_scale=3e0", "rewards.bright.options.at=2"])
    assert loaded.call["guidance_scale"] == 3.0
    assert isinstance(loaded.call["guidance_scale"], float)
    assert loaded.rewards["bright"].options == {"at": 2}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("iteration=3", "unknown key iteration; did you mean iterations?"),
        ("model.lora.rnk=3", "unknown key model.lora.rnk; did you mean rank?"),
        ("algorithm.group_sise=3", "unknown key algorithm.group_sise; did you mean group_size?"),
        ("rewards.bright.wieght=3", "unknown key rewards.bright.wieght; did you mean weight?"),
        ("evaluation.zzz=3", "unknown key evaluation.zzz; known: prompts, num_prompts"),
        ("iterations=many", "iterations: Value 'many' of type 'str' could not be converted to Integer"),
        ("iterations=2.5", "iterations: Value '2.5' of type 'float'"),
        ("iterations=true", "iterations: Value 'True' of type 'bool'"),
        ("optimizer.lr=fast", "optimizer.lr: Value 'fast'"),
        ("algorithm.clip=tight", "algorithm.clip: Value 'tight'"),
        ("rewards.bright.weight=heavy", "rewards.bright.weight: Value 'heavy'"),
        ("model.lora.targets=to_q", "model.lora.targets: expected a list"),
        ("sampler.window=[0,x]", "sampler.window[1]: Value 'x'"),
        ("model=folder", "model: expected keys and values, got 'folder'"),
        ("model.lora=null", "model.lora: expected keys and values, got nothing"),
        ("algorithm=grpo", "algorithm: expected keys and values, got 'grpo'"),
        ("rewards.bright=clip", "rewards.bright: expected keys and values, got 'clip'"),
        ("algorithm.name=gpro", "algorithm.name: 'gpro' is not an algorithm; did you mean grpo?"),
        ("name=null", "name: "),
        ("rewards.new.weight=1", "missing key rewards.new.use"),
        ("tracker=tensorbord", "tracker: 'tensorbord' is none of null, auto, tensorboard, wandb, trackio"),
        ("model.dtype=fp16", "model.dtype: 'fp16' is none of float32, bfloat16, float16"),
        ("model.device=gpu", "model.device: 'gpu' is none of null, cpu, cuda"),
        ("iterations=0", "iterations: 0 is not above 0"),
        ("batch.update=0", "batch.update: 0 is not above 0"),
        ("optimizer.lr=inf", "optimizer.lr: inf is not above 0"),
        ("optimizer.lr=nan", "optimizer.lr: nan is not above 0"),
        ("sampler.noise_level=-1", "sampler.noise_level: -1.0 is not 0 or more"),
        ("max_invalid=2", "max_invalid: 2.0 is not between 0 and 1"),
        ("evaluation.trained_share=1.1", "evaluation.trained_share: 1.1 is not between 0 and 1"),
        ("sampler.tail=0", "sampler.tail: 0.0 is not above 0, up to 1"),
        ("sampler.tail=1.5", "sampler.tail: 1.5 is not above 0, up to 1"),
        ("sampler.window=[0]", "sampler.window: [0] is not [start, stop]"),
        ("optimizer.betas=[0.9]", "optimizer.betas: [0.9] is not two numbers"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas: [0.9, 1.0] is not two numbers"),
        ("model.lora.targets=[]", "model.lora.targets: names no layer"),
        ("rewards.bright.weight=0", "rewards: none has a weight"),
        ("rewards.bright.weight=nan", "rewards.bright.weight: nan is not finite"),
        ("rewards.mean.use=clip", "rewards.mean: cannot be a reward's name"),
        ("call.height", "override 'call.height': expected key=value"),
        ("call.height=[1", "override 'call.height=[1': did not find expected"),
        ("rewards=[a]", "override 'rewards=[a]'"),
        ("call.height=${nosuch}", "call.height: Interpolation key 'nosuch' not found"),
    ],
)
def test_a_wrong_value_is_named(write, override, words):
    message = refusal(write(), override)
    assert words in message
    assert message.startswith(("override", str(write())))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "line 2 is not valid YAML: found duplicate key a"),
        ("a:\n\t- b\n", "line 2 is not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "missing key name"),
        ("name: x\n", "missing key model.path"),
        ("name: x\nmodel: {path: a}\ndata: {prompts: b}\n", "missing key algorithm.name; known: "),
        ("name: x\nmodel:\n", "model: expected keys and values, got nothing"),
        ("name: x\nmodel: {path: a}\nalgorithm: {name: grpo}\n", "missing key data.prompts"),
        ("1: 2\n", "unknown key 1"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(path)
    assert words in message
    assert message.startswith(str(path))


def test_files_that_are_no_text(tmp_path):
    assert "no such recipe" in refusal(tmp_path / "none.yaml")
    assert "no such recipe" in refusal(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "not valid YAML" in refusal(tmp_path / "bytes.yaml")


def test_a_saved_recipe_is_the_same_recipe(write, tmp_path):
    overrides = ["optimizer.lr=3e-5", "sampler.window=null", "rewards.bright.options.at=3", "algorithm.kl=0.01"]
    resolved = load_recipe(write(), overrides)
    saved = tmp_path / "config.yaml"
    save_recipe(resolved, saved, {"torch": "1.2.3"})
    assert load_recipe(saved) == resolved
    assert load_recipe(saved, ["iterations=5"]).iterations == 5
    assert yaml.safe_load(saved.read_text())["versions"] == {"torch": "1.2.3"}


def test_default_output_is_named_after_the_run(write, monkeypatch):
    assert str(load_recipe(write(), ["output=null", "name=first"]).folder) == "runs/first"
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(load_recipe(write(), ["output=~/runs/x"]).folder) == "/home/someone/runs/x"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository_load(path):
    load_recipe(path)


def heavy_modules(arguments: str) -> str:
    code = (
        f"import sys; from alignment.run import main\ntry:\n    code = main({arguments})\n"
        "except SystemExit as error:\n    code = error.code\n"
        "print(code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True).stdout


def test_help_and_typos_are_answered_without_heavy_imports(tmp_path):
    assert heavy_modules("['--help']").splitlines()[-1] == "0 []"
    path = tmp_path / "bad.yaml"
    path.write_text("nane: x\n")
    assert heavy_modules(f"[{str(path)!r}]").splitlines()[-1] == "2 []"
