"""The command that makes candidates and guided pairs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from alignment.data import Group, Pair, check_media, read_preferences
from alignment.generate import main
from alignment.generation import first_step
from alignment.policy import load_pipeline
from rewards.video_files import read_video
from tests.alignment.two_processes import joined, spawned


@pytest.fixture
def generate(write, recipe, tmp_path, capsys):
    """`python -m alignment.generate RECIPE ...` in this process: exit code, stdout, stderr, folder."""
    recipe["sampler"] = {"steps": 4, "kernel": "ode", "shared_noise": False}

    def generate(*arguments):
        capsys.readouterr()
        folder = tmp_path / "made"
        code = main([str(write()), "--out", str(folder), *arguments])
        out, err = capsys.readouterr()
        return code, out, err, folder

    return generate


def test_candidates_are_whole_groups_in_the_schema(generate):
    code, out, err, folder = generate("--candidates", "2")
    assert code == 0, err
    records = read_preferences(folder / "index.jsonl")
    check_media(records, deep=True)
    assert [record.prompt.text for record in records] == ["a red circle", "a blue square", "a green dot"]
    assert all(isinstance(record, Group) and len(record.members) == 2 for record in records)
    frames, fps = read_video(records[0].members[0].video)
    assert frames.shape == (5, 3, 16, 16)
    assert fps == 8
    assert len({load_file(member.latent)["state"].sum() for record in records for member in record.members}) == 6
    assert "6 videos in 3 records" in out


def test_latent_is_what_the_pipeline_makes_of_the_noise(generate, recipe):
    """The state decodes to the video, and the pipeline's own scheduler leads from the noise to the state."""
    _, _, _, folder = generate("--candidates", "1")
    member = read_preferences(folder / "index.jsonl")[0].members[0]
    made = load_file(member.latent)
    pipe = load_pipeline(_model(recipe), torch.device("cpu"))
    call = {**recipe["call"], "num_inference_steps": 4, "prompt": ["a red circle"], "latents": made["noise"][None]}
    state = pipe(**call, output_type="latent").frames
    # The toolkit's rollout takes Euler's steps, UniPC corrects them: close, and no other noise is.
    other = pipe(**{**call, "latents": made["noise"][None].flip(-1)}, output_type="latent").frames
    assert (state[0] - made["state"]).square().mean() < 0.2 * (other[0] - made["state"]).square().mean()


def _model(recipe):
    from alignment.config import ModelConfig

    return ModelConfig(path=recipe["model"]["path"])


def test_interrupted_call_goes_on_and_makes_the_same(generate):
    _, _, _, folder = generate("--candidates", "2")
    before = {path.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}
    for name in ("latents/000001_01.safetensors", "videos/000002_00.mp4", "index.jsonl"):
        (folder / name).unlink()
    code, out, err, _ = generate("--candidates", "2")
    assert code == 0, err
    assert "4 of 6 videos are there already" in out
    assert {path.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}.keys() == before.keys()
    again = load_file(folder / "latents/000001_01.safetensors")["state"]
    first = torch.frombuffer(bytearray(before["000001_01.safetensors"]), dtype=torch.uint8)
    (folder / "first.safetensors").write_bytes(bytes(first.tolist()))
    assert torch.allclose(again, load_file(folder / "first.safetensors")["state"], atol=1e-5)
    assert not list(folder.glob("*/.new.*"))


def test_micro_batches_change_nothing(generate, recipe, tmp_path):
    _, _, _, folder = generate("--candidates", "2")
    kept = shutil.copytree(folder, tmp_path / "kept")
    shutil.rmtree(folder)
    recipe["batch"] = {"rollout": 1}
    generate("--candidates", "2")
    for path in kept.glob("latents/*"):
        assert torch.allclose(load_file(path)["state"], load_file(folder / "latents" / path.name)["state"], atol=1e-5)


def in_two_processes(rank, folder, port):
    joined(rank, port)
    assert main([str(folder / "recipe.yaml"), "--out", str(folder / "shared"), "--candidates", "2"]) == 0


def test_two_processes_share_the_work(generate, tmp_path):
    _, _, _, folder = generate("--candidates", "2")
    spawned(in_two_processes, tmp_path)
    assert (folder / "index.jsonl").read_text() == (tmp_path / "shared/index.jsonl").read_text()
    for path in folder.glob("latents/*"):
        other = load_file(tmp_path / "shared/latents" / path.name)["state"]
        assert torch.allclose(load_file(path)["state"], other, atol=1e-5)


def test_guided_pairs_share_their_start(generate, tmp_path):
    _, _, _, folder = generate("--candidates", "1")
    real = shutil.move(folder, tmp_path / "real")
    code, _, err, folder = generate("--guided", f"{real}/index.jsonl", "--eta", "0.5", "0.9")
    assert code == 0, err
    pairs = read_preferences(folder / "index.jsonl")
    assert all(isinstance(pair, Pair) and pair.label is None and 0.5 <= pair.eta <= 0.9 for pair in pairs)
    a, b = (load_file(member.latent) for member in pairs[0].members)
    assert not torch.equal(a["noise"], b["noise"])
    assert not torch.equal(a["state"], b["state"])


def test_the_less_noise_the_more_a_guided_pair_resembles_its_video(generate, tmp_path):
    _, _, _, folder = generate("--candidates", "1")
    real = shutil.move(folder, tmp_path / "real")
    wanted = load_file(next(real.glob("latents/000000*")))["state"]
    errors = []
    for eta in ("0.02", "0.6", "1"):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        _, _, _, folder = generate("--guided", f"{real}/index.jsonl", "--eta", eta, eta, "--eta-space", "index")
        errors.append(float((load_file(folder / "latents/000000_00a.safetensors")["state"] - wanted).square().mean()))
    assert errors[0] < errors[1] < errors[2]


def test_pure_noise_forgets_the_video(generate, tmp_path):
    """With eta 1 the pair is a vanilla one: what it starts from says nothing of the video."""
    _, _, _, folder = generate("--candidates", "2")
    real = shutil.move(folder, tmp_path / "real")
    rows = [json.loads(line) for line in (real / "index.jsonl").read_text().splitlines()]
    made = []
    for member in (0, 1):
        lines = [json.dumps({**row, "members": [row["members"][member]]}) for row in rows]
        (real / "one.jsonl").write_text("\n".join(lines))
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        generate("--guided", f"{real}/one.jsonl", "--eta", "1", "1")
        made.append(load_file(tmp_path / "made/latents/000000_00a.safetensors")["state"])
    first_level = 0.9998  # UniPC's grid starts a little below 1
    assert (made[0] - made[1]).abs().max() < 0.01 / first_level


LEVELS = [1.0, 0.95, 0.9, 0.75, 0.5, 0.0]


@pytest.mark.parametrize(
    ("eta", "space", "step"),
    [
        (1.0, "sigma", 0), (0.95, "sigma", 1), (0.8, "sigma", 3), (0.1, "sigma", 4),
        (1.0, "index", 0), (0.8, "index", 1), (0.65, "index", 2), (0.05, "index", 4),
    ],
)  # fmt: skip
def test_first_step(eta, space, step):
    assert first_step(LEVELS, eta, space) == step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eta", "0.9", "0.8"], "--eta: 0.9 0.8 is not LOW HIGH"),
        (["--candidates", "0"], "1 or more"),
        (["--guided", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--weights", "nowhere"], "--weights: nowhere holds no checkpoint"),
        (["call.hight=16"], "call.hight"),
    ],
)
def test_bad_options_are_one_line(generate, arguments, message):
    code, _, err, folder = generate(*arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(folder.glob("*/*"))


def test_folder_of_other_settings_is_refused(generate):
    generate("--candidates", "1")
    code, _, err, _ = generate("--candidates", "1", "seed=3")
    assert code == 2
    assert "other settings (seed)" in err
