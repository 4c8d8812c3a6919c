"""Bad input: one line on stderr, exit code 2, before anything is loaded or written."""

import collections
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import alignment.policy
from alignment.check import check_disk, looks_local
from alignment.config import load_recipe
from alignment.errors import UserError
from tests.alignment.conftest import in_subprocess


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Loading a pipeline's weights fails the test."""

    def tripped(*arguments):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(alignment.policy, "load_pipeline", tripped)


@pytest.fixture
def own_base(base, recipe, tmp_path):
    """A copy of the model folder, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    recipe["model"]["path"] = str(folder)
    return folder


def refused(outcome, *words):
    """The refusal's line, which names all these words; no run folder was made."""
    line = outcome.only_line()
    assert outcome.code == 2
    assert line.startswith("error: ")
    assert not outcome.folder.exists()
    for word in words:
        assert word in line, line
    return line


def test_check_of_a_good_recipe(command, nothing_is_loaded):
    outcome = command("--check")
    assert (outcome.code, outcome.err) == (0, "")
    assert not outcome.folder.exists()
    first, prompts, parameters, memory = outcome.out.splitlines()
    assert first.endswith("recipe.yaml: good")
    assert prompts.strip() == "3 prompts, pipeline WanPipeline"
    # Two blocks of two attentions with q and v, each 24 x 24: rank 2 adds 2 * (24 + 24) numbers.
    assert parameters.startswith("  trained parameters 768 on 8 layers, frozen ")
    assert "memory for weights" in memory


def test_memory_estimate_counts_what_a_run_trains(command, base):
    frozen = sum(t.numel() for file in base.glob("*/*.safetensors") for t in load_file(file).values())
    denoiser = sum(t.numel() for t in load_file(next(base.glob("transformer/*.safetensors"))).values())
    lora, full = command("--check").out, command("--check", "model.trained=full").out
    assert f"trained parameters 768 on 8 layers, frozen {frozen:,}" in lora
    assert f"trained parameters {denoiser:,}, frozen {frozen - denoiser:,}" in full
    state = full.partition("optimiser ")[2].split(";")[0]
    assert state == f"{denoiser * 12 / 1000:.3g} KB"
    with_average = command("--check", "model.trained=full", "ema.decay=0.9").out
    assert f"optimiser {denoiser * 16 / 1e6:.3g} MB" in with_average or f"{denoiser * 16 / 1e3:.3g} KB" in with_average


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("iteration=3", "unknown key iteration; did you mean iterations?"),
        ("iterations=many", "iterations: Value 'many'"),
        ("algorithm.group_size=1", "algorithm.group_size: 1 has no group to compare with"),
        ("sampler.kernel=ode", "a deterministic sampler has no policy gradient"),
        ("sampler.noise_level=0", "a deterministic sampler has no policy gradient"),
        ("sampler={kernel: cps, noise_level: 1.2}", "sampler.noise_level: 1.2"),
        ("sampler.kernel=flw", "sampler.kernel: 'flw' is none of ode, dance, flow, "),
        ("sampler.window=[1,7]", "sampler.window: [1, 7] holds no step of a rollout of 3"),
        ("sampler.window=[2,2]", "sampler.window: [2, 2] holds no step"),
        ("sampler.tail=0.4", "sampler.tail: no steps follow the noise; set algorithm.window.size"),
        ("algorithm.trained_steps=5", "algorithm.trained_steps: 5 of 2 stochastic steps"),
        ("rewards.bright.weight=0", "rewards: none has a weight"),
        ("rewards.bright.use=clipp", "rewards.bright: reward clipp: unknown name (did you mean 'clip'?)"),
        ("rewards.bright.use=no.such:thing", "rewards.bright: reward no.such:thing: no.such does not import"),
        ("rewards.bright.use=nosuch.py:thing", "rewards.bright: reward nosuch.py:thing: no file nosuch.py"),
        ("rewards.bright.options.att=1", "no option 'att' (did you mean 'at'?)"),
        ("rewards.contrast.options.at=1", "rewards.contrast: "),
        ("call.num_frame=5", "call.num_frame: WanPipeline takes no such argument; did you mean num_frames?"),
        ("call.prompt=x", "call.prompt: is set by the toolkit"),
        ("data.prompts=/no/such.txt", "data.prompts: no such file: /no/such.txt"),
        ("evaluation.prompts=/no/such.txt", "evaluation.prompts: no such file: /no/such.txt"),
        ("model.path=/no/such/folder", "model.path: no such folder: /no/such/folder"),
        ("model.pipeline=WanPipelin", "model.pipeline: diffusers has no 'WanPipelin'; did you mean WanPipeline?"),
        ("model.lora.targets=[to_qq]", "model.lora.targets: 'to_qq' matches no layer of transformer; near: to_q"),
        ("tracker=wandb", "tracker: wandb is not installed"),
        ("model.device=cuda", "model.device: cuda is not available here"),
    ],
)
@pytest.mark.parametrize("check", [True, False], ids=["check", "run"])
def test_bad_recipes(command, override, words, check, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    refused(command(override, *["--check"] * check), words)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "\n \n", "holds no prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        ("other.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'line 2 has no "prompt"'),
        ("other.csv", "text,tag\na,b\n", 'no column "prompt" among text, tag'),
        ("gap.csv", "prompt,tag\na,b\n,c\n", 'line 3 has no "prompt"'),
        ("prompts.yaml", "- a\n", "unknown format '.yaml'; use .txt, .jsonl, .csv"),
    ],
)
def test_bad_prompts(command, recipe, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    recipe["data"]["prompts"] = str(tmp_path / name)
    refused(command(), "data.prompts: ", name, words)


@pytest.mark.usefixtures("nothing_is_loaded")
class TestHalfWrittenModel:
    def test_no_index(self, command, own_base):
        (own_base / "model_index.json").unlink()
        refused(command(), f"model.path: {own_base} holds no model_index.json")

    def test_index_cut_short(self, command, own_base):
        (own_base / "model_index.json").write_text((own_base / "model_index.json").read_text()[:40])
        refused(command(), "model_index.json is not valid JSON")

    def test_missing_component(self, command, own_base):
        shutil.rmtree(own_base / "vae")
        refused(command(), "component vae is missing")

    def test_missing_weights(self, command, own_base):
        next((own_base / "text_encoder").glob("*.safetensors")).unlink()
        refused(command(), f"{own_base / 'text_encoder'} holds no weights")

    @pytest.mark.parametrize("kept", [0, 5, 100, -1])
    def test_weights_cut_short(self, command, own_base, kept):
        weights = next((own_base / "transformer").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:kept])
        refused(command(), f"{weights} is cut short")

    def test_weights_that_are_something_else(self, command, own_base):
        weights = next((own_base / "transformer").glob("*.safetensors"))
        weights.write_bytes((20).to_bytes(8, "little") + b"<html>not found</html>")
        refused(command(), f"{weights} is not a safetensors file")

    def test_missing_shard(self, command, own_base):
        weights = next((own_base / "transformer").glob("*.safetensors"))
        tensors = load_file(weights)
        shards = [weights.with_name(f"{weights.stem}-0000{i}-of-00002.safetensors") for i in (1, 2)]
        names = list(tensors)
        save_file({name: tensors[name] for name in names[:10]}, shards[0])
        where = {name: shards[0 if i < 10 else 1].name for i, name in enumerate(names)}
        (weights.parent / f"{weights.name}.index.json").write_text(json.dumps({"weight_map": where}))
        weights.unlink()
        refused(command(), f"{shards[1]} is missing")


def test_not_enough_disk(command, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**6))
    outcome = command()
    assert outcome.code == 2
    assert "1 MB free and the run may need 210 MB" in outcome.only_line()


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], 40.2),
        (["checkpoint.keep=1"], 28.2),
        (["ema.decay=0.9"], 52.2),
        (["ema.decay=0.9", "evaluation.every=1", "evaluation.patience=1"], 64.2),
    ],
)
def test_disk_that_a_billion_trained_weights_need(write, tmp_path, monkeypatch, overrides, needed):
    """A checkpoint holds weights, two moments, average and best, 4 bytes each; keep + 1 exist while one is made."""
    usage = collections.namedtuple("usage", "total used free")
    recipe = load_recipe(write(), list(overrides))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, (needed + 0.1) * 1e9))
    check_disk(tmp_path / "not" / "yet", 10**9, recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, (needed - 0.1) * 1e9))
    with pytest.raises(UserError, match=f"the run may need {needed} GB"):
        check_disk(tmp_path / "not" / "yet", 10**9, recipe)


def test_a_reward_that_cannot_be_built(command, rewards_file):
    outcome = command(f"rewards.bright.use={rewards_file}:NeedsFile")
    assert outcome.code == 2
    line = outcome.only_line()
    assert "rewards.bright: FileNotFoundError" in line
    assert f"({rewards_file}:" in line


@pytest.mark.parametrize("arguments", [("call.height=30",), ("call.max_sequence_length=4096", "call.num_frames=x")])
def test_arguments_that_the_pipeline_refuses(command, arguments):
    outcome = command(*arguments)
    assert outcome.code == 2
    line = outcome.only_line()
    assert line.startswith("error: call: WanPipeline cannot run with guidance_scale=1.0, height=")
    assert not {path.name for path in outcome.folder.iterdir()} - {"embeddings"}
    assert command().code == 0  # the folder is not taken by the refused run


def test_targets_of_a_folder_without_safetensors_are_refused_at_loading(command, monkeypatch):
    monkeypatch.setattr("alignment.check.memory_estimate", lambda recipe: [])
    line = command("model.lora.targets=[nosuch]").only_line()
    assert "model.lora.targets: 'nosuch' matches no layer of transformer" in line
    assert "candidates: " in line
    assert "to_out.0" in line


def test_a_hub_id_that_cannot_be_reached(write, tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = in_subprocess(str(write()), "model.path=reelign-tests/no-such-model", environment=unreachable)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: model.path: cannot load a pipeline from 'reelign-tests/no-such-model'")
    assert "Traceback" not in done.stderr


def test_an_output_that_is_a_file(command, tmp_path):
    (tmp_path / "run").write_text("")
    outcome = command()
    assert outcome.code == 2
    assert f"output: {tmp_path / 'run'} is a file" in outcome.only_line()


def test_an_output_below_a_file(command, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = command(f"output={tmp_path / 'file' / 'run'}")
    assert outcome.code == 2
    assert "output: cannot create" in outcome.only_line()


def test_an_occupied_folder(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    outcome = command()
    assert outcome.code == 2
    assert "already holds a run; add --resume to go on, or output=... for another folder" in outcome.only_line()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("path", ["./model", "/model", "~/model", "model", "a/b/c"])
def test_folders_are_told_from_hub_ids(path):
    assert looks_local(path)
    assert not looks_local("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_variants_are_not_counted_twice(command, own_base):
    """A folder with every file in two precisions holds one model."""
    once = command("--check").out
    for file in list(own_base.glob("*/*.safetensors")):
        shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    assert command("--check").out == once
    assert command("--check", "model.variant=fp16").out == once
