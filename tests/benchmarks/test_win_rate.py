"""The command on a tiny random pipeline: a base, itself under another name, and a run that was shaken, not trained."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from alignment.config import load_recipe, save_recipe
from alignment.data import Prompt
from alignment.policy import load_policy
from benchmarks.win_rate import main
from benchmarks.winning import command
from benchmarks.winning.judges import read_judges
from benchmarks.winning.models import contenders, load_model
from benchmarks.winning.motion import load_flow
from benchmarks.winning.scoring import Answers, Scoring
from benchmarks.winning.videos import make_videos, planned, read_frames, sample, videos_of
from rewards.video_files import read_video
from samplers import seed_for
from tests.alignment.tiny import shake
from tests.pipelines import FAMILIES

PROMPTS = ["a red circle", "a blue square"]
CALL = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 16}
REWARDS = '''
from rewards import Scores


def bright(videos, prompts):
    return videos.mean((1, 2, 3, 4))


def contrast(videos, prompts):
    return videos.std((1, 2, 3, 4))


class Parts:
    """A reward with a dimension, which cannot judge what is about a square."""

    name, scope, differentiable = "parts", "clip", False

    def __call__(self, clips):
        values = [clip.video.mean() for clip in clips]
        total = [v * float("nan") if "square" in clip.prompt else v for v, clip in zip(values, clips)]
        import torch

        return Scores(torch.stack(total), {"red": torch.stack([clip.video[:, 0].mean() for clip in clips])})


class Batch(Parts):
    scope = "batch"
'''


class World(NamedTuple):
    folder: Path
    base: Path
    run: Path
    rewards: Path
    prompts: Path

    def arguments(self, out: Path | str, *more: str) -> list[str]:
        """Base against itself and the run: trained for brightness, and contrast held out."""
        given = ["--base", self.base, "--tuned", f"same={self.base}", "--tuned", self.run, "--prompts", self.prompts]
        given += ["--judge", f"{self.rewards}:bright", "--judge", f"{self.rewards}:contrast", "--out", out]
        return [*map(str, given), "--samples", "2", "--flow", "dis", *more]


def make_run(world: World, name: str, **model: Any) -> Path:
    """A run folder as training leaves it, with weights that were moved at random."""
    recipe = {
        "name": name,
        "output": str(world.folder / name),
        "fps": 8,
        "model": {"path": str(world.base), "device": "cpu", "lora": {"rank": 2, "alpha": 4}, **model},
        "call": CALL,
        "sampler": {"steps": 3},
        "rewards": {
            "bright": {"use": f"{world.rewards}:bright"},
            "contrast": {"use": f"{world.rewards}:contrast", "weight": 0},
        },
        "algorithm": {"name": "grpo"},
        "data": {"prompts": str(world.prompts)},
        "evaluation": {"batch": 4},
        "tracker": None,
    }
    path = world.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    loaded = load_recipe(path)
    policy = load_policy(loaded, torch.device("cpu"))
    shake(policy, 0.3)
    loaded.folder.mkdir()
    save_recipe(loaded, loaded.folder / "config.yaml", {})
    policy.save(loaded.folder)
    prompt, seed = PROMPTS[1], seed_for(0, "win rate", 1, 1)
    np.save(loaded.folder / "expected.npy", policy.generate([prompt], [seed])[0].numpy())
    return loaded.folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    world = World(folder, folder / "wan", folder / "tuned", folder / "my_rewards.py", folder / "prompts.txt")
    FAMILIES["wan"]()[0].save_pretrained(world.base)
    world.rewards.write_text(REWARDS, "utf-8")
    world.prompts.write_text("\n".join(PROMPTS), "utf-8")
    make_run(world, "tuned")
    return world


@pytest.fixture(scope="module")
def made(world, tmp_path_factory) -> Path:
    """A finished comparison; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert main(world.arguments(out)) == 0
    return out


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def unplotted(monkeypatch) -> None:
    """No picture, which takes a second."""
    monkeypatch.setattr(command, "plot", lambda found, scores, path: path.touch())


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """The one line of a call that ends with exit code 2."""

    def refused(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return refused


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text("utf-8"))


def frames(out: Path, model: str) -> dict[str, torch.Tensor]:
    return {path.name: read_video(path)[0] for path in sorted((out / model / "frames").glob("*.mkv"))}


def test_a_model_against_itself_is_a_tie_everywhere(made) -> None:
    base, same, tuned = (frames(made, name) for name in ("base", "same", "tuned"))
    assert list(base) == [f"000{prompt}_{sample}.mkv" for prompt in range(2) for sample in range(2)]
    assert all(torch.equal(base[name], same[name]) for name in base)
    assert not any(torch.equal(base[name], tuned[name]) for name in base)
    assert len({video.numpy().tobytes() for video in base.values()}) == 4  # another noise for each
    for judge in result(made)["comparisons"]["same"]["judges"].values():
        found = judge["dims"]["overall"]
        assert (found["rate"], found["wins"], found["ties"], found["losses"]) == (0.5, 0, 4, 0)
        assert found["scores"]["change"] == 0


def test_numbers_are_those_of_the_kept_frames(made) -> None:
    """Brightness of the 8-bit frames, in numpy: who wins, means, and win rates by sample."""
    bright = {name: [float(v.double().mean()) / 255 for v in frames(made, name).values()] for name in ("base", "tuned")}
    wins = [t > b for b, t in zip(bright["base"], bright["tuned"], strict=True)]
    found = result(made)["comparisons"]["tuned"]["judges"]["bright"]["dims"]["overall"]
    assert (found["wins"], found["losses"], found["masked"]) == (sum(wins), 4 - sum(wins), 0)
    assert found["scores"]["base"] == pytest.approx(np.mean(bright["base"]), abs=1e-6)
    assert found["scores"]["tuned"] == pytest.approx(np.mean(bright["tuned"]), abs=1e-6)
    assert found["rate_by_sample"] == [np.mean(wins[::2]), np.mean(wins[1::2])]
    films = [v.double() / 255 for v in frames(made, "tuned").values()]
    apart = [((a - b) ** 2 / 2).mean().sqrt() for a, b in zip(films[::2], films[1::2], strict=True)]
    measured = result(made)["comparisons"]["tuned"]["measures"]
    assert measured["diversity"]["tuned"] == pytest.approx(float(np.mean(apart)), rel=1e-4)
    assert measured["brightness"]["pairs"] == 4


def test_judges_are_told_apart_by_the_recipe_of_the_run(made) -> None:
    judges = result(made)["comparisons"]["tuned"]["judges"]
    assert {name: judge["relation"] for name, judge in judges.items()} == {
        "bright": "trained on",
        "contrast": "independent",
    }
    assert {judge["relation"] for judge in result(made)["comparisons"]["same"]["judges"].values()} == {"unknown"}
    page = (made / "index.html").read_text("utf-8")
    assert "trained on" in page
    assert page.count("<video") == 2 * 2 * 2
    assert all((made / name).stat().st_size > 1000 for name in ("result.png", "voting.html"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_samples_as_its_training_evaluates(world, tmp_path, kind) -> None:
    """The saved weights on the base, against the policy that saved them; and a call of one against a call of two."""
    run = world.run if kind == "lora" else make_run(world, "full", trained="full")
    model = contenders(str(world.base), [str(run)], None, [])[1]
    policy = load_model(model, torch.device("cpu"), tmp_path)
    videos = videos_of([Prompt(text, {}) for text in PROMPTS], 2)
    expected = torch.from_numpy(np.load(run / "expected.npy"))
    both = sample(policy, videos[2:], 0, None, 1.0)
    assert torch.allclose(both[1], expected, atol=1e-5)
    assert torch.allclose(sample(policy, videos[3:], 0, None, 1.0)[0], expected, atol=1e-5)
    assert not torch.allclose(both[0], expected, atol=1e-2)
    with policy.reference() if kind == "lora" else contextlib.nullcontext():
        assert torch.allclose(sample(policy, videos[3:], 0, None, 1.0)[0], expected, atol=1e-2) == (kind == "full")


def test_an_interrupted_comparison_comes_to_the_same_numbers(world, made, copy, capsys, unplotted) -> None:
    (copy / "tuned/frames/0001_0.mkv").unlink()
    journal = copy / "scores/0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:20])  # torn by a crash
    (copy / "result.json").unlink()
    assert main(world.arguments(copy)) == 0
    assert result(copy)["comparisons"] == result(made)["comparisons"]
    before, after = (frames(out, "tuned") for out in (made, copy))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "videos of tuned" in capsys.readouterr().out


class Turns(NamedTuple):
    """Two processes, one of which waits until the other is done with everything."""

    rank: int
    count: int = 2
    device: torch.device = torch.device("cpu")

    def share(self, items: list) -> list:
        return items[self.rank :: self.count]

    def wait(self) -> None:
        pass


def test_two_processes_come_to_the_numbers_of_one(world, made, tmp_path) -> None:
    given = world.arguments(tmp_path)
    models = contenders(str(world.base), [str(world.run)], None, [])
    videos = videos_of([Prompt(text, {}) for text in PROMPTS], 2)
    judges = read_judges([given[given.index("--judge") + 1]])
    flow, console, whole = load_flow("dis"), Console(quiet=True), Answers(made, judges, "dis")
    for model in models:
        (tmp_path / model.name / "frames").mkdir(parents=True)
        model.recipe.evaluation.batch = 2
    parts = [Answers(tmp_path, judges, "dis") for _ in range(2)]
    plan = planned(tmp_path, models[1:], videos)
    for rank in (1, 0):
        make_videos(tmp_path, models[1:], plan, Turns(rank), console)
    for rank in (1, 0):
        scoring = Scoring(tmp_path, parts[rank], ["tuned"], videos, 8, 2, Turns(rank), console)
        scoring.judge("bright", judges["bright"])
        scoring.measure(flow)
    assert [len((tmp_path / f"scores/{rank}.jsonl").read_text("utf-8").splitlines()) for rank in (0, 1)] == [4, 4]
    parts[0].read()
    for key, values in parts[0].rows.items():
        assert values == pytest.approx(whole.rows[key], abs=1e-5), key
    for video in videos:
        ours, theirs = (read_frames(out, "tuned", video.name).int() for out in (tmp_path, made))
        assert (ours - theirs).abs().max() <= 1  # calls of two and of four


def test_judges_of_pairs_and_judges_that_cannot_judge(world, copy, unplotted) -> None:
    """A win rate of brightness decides as brightness does; parts has no answer about a square."""
    pairs = f"pairs=win_rate:judge={world.rewards}:bright"
    assert (
        main(world.arguments(copy, "--judge", pairs, "--judge", f"{world.rewards}:Parts", "--tie-eps", "Parts=9")) == 0
    )
    found = result(copy)["comparisons"]["tuned"]["judges"]
    alone, pair, parts = (found[name]["dims"]["overall"] for name in ("bright", "pairs", "Parts"))
    assert pair["scores"] is None
    assert [pair[key] for key in ("rate", "wins", "losses", "p")] == [
        alone[key] for key in ("rate", "wins", "losses", "p")
    ]
    assert found["pairs"]["relation"] == "trained on"  # brightness is a part of it
    assert (parts["ties"], parts["masked"]) == (2, 2)
    assert found["Parts"]["dims"]["red"]["masked"] == 2
    assert "not always able to judge" in (copy / "index.html").read_text("utf-8")


def test_other_settings_are_refused(world, made, refused, tmp_path) -> None:
    before = result(made)
    line = refused(world.arguments(made, "sampler.steps=2", "call.guidance_scale=2.0"))
    assert "(call, steps)" in line
    assert str(made) in line
    assert "other settings (prompts)" in refused(world.arguments(made, "--limit", "1"))
    other = shutil.copytree(world.run, tmp_path / "tuned")
    weights = other / "lora/pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")  # trained on since
    arguments = [str(other) if word == str(world.run) else word for word in world.arguments(made)]
    assert "other settings (models)" in refused(arguments)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert "not empty" in refused(world.arguments(tmp_path / "mine"))
    assert result(made) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--judge", "clipp"], "did you mean 'clip'"),
        (["--judge", "bright=sprite_motion"], "the name bright is taken"),
        (["--judge", "people=sprite_motion"], "the name people is taken"),
        (["--tuned", "base=RUN"], "'base' is taken"),
        (["--tuned", "../elsewhere=RUN"], "cannot be a folder's name"),
        (["--tuned", "nowhere/"], "--tuned nowhere: model.path: no such folder"),
        (["--tie-eps", "brigth=1"], "JUDGE=NUMBER; judges: bright, contrast"),
        (["--tie-eps", "-1"], "0 or more"),
        (["--vbench", "other=scores.json"], "models: base, same, tuned"),
        (["--votes", "nowhere.json"], "leave --votes out at first"),
        (["iterations=3"], "says nothing about sampling"),
        (["call.heigth=16"], "did you mean height?"),
        (["evaluation.trained_share=0.5"], "is no LoRA run"),
        (["--settings", "nowhere.yaml"], "no such recipe"),
        (["--prompts", "nowhere.txt"], "neither a file nor one of"),
    ],
)
def test_bad_input_is_one_line(world, refused, tmp_path, change, words) -> None:
    places = {"RUN": world.run, "REWARDS": world.rewards}
    for place, path in places.items():
        change = [word.replace(place, str(path)) for word in change]
    assert words in refused(world.arguments(tmp_path / "out", *change))


def test_a_judge_that_cannot_be_used_is_found_before_videos_are_made(world, refused, tmp_path) -> None:
    arguments = world.arguments(tmp_path / "out", "--judge", f"{world.rewards}:Batch")
    assert "a judge sees a clip or a pair" in refused(arguments)
    assert not list(tmp_path.rglob("*.mp4"))


def vote(key: Path, path: Path, voter: str, choices: dict[str, str]) -> Path:
    """What the page exports: for each pair the model that is better, or tie."""
    rows, content = [], json.loads(key.read_text("utf-8"))
    for number, entry in content["comparisons"].items():
        if choice := choices.get(entry["id"]):
            side = {True: "left", False: "right"}[choice == entry["left"]]
            row = {"comparison": number, "question": "overall", "choice": "tie" if choice == "tie" else side}
            rows.append(row)
    path.write_text(json.dumps({"page": content["page"], "voter": voter, "name": voter, "votes": rows}), "utf-8")
    return path


def test_people_are_one_more_judge(world, copy, tmp_path, refused, unplotted) -> None:
    """Two people, three answers about the tuned model: won, tied, lost; one about the base under another name."""
    key = copy / "voting_key.json"
    first = vote(
        key, tmp_path / "1.json", "ada", {"tuned/0000_0": "tuned", "tuned/0001_0": "tie", "same/0000_0": "base"}
    )
    second = vote(key, tmp_path / "2.json", "bob", {"tuned/0001_0": "base"})
    assert main(world.arguments(copy, "--votes", str(first), "--votes", str(second))) == 0
    found = result(copy)["comparisons"]
    people = found["tuned"]["judges"]["people"]
    assert people["relation"] == "independent"
    assert [people["dims"]["overall"][key] for key in ("wins", "ties", "losses", "rate")] == [1, 1, 1, 0.5]
    assert found["same"]["judges"]["people"]["dims"]["overall"]["losses"] == 1
    assert "votes twice" in refused(world.arguments(copy, "--votes", str(first), "--votes", str(first)))


def test_what_is_no_run_needs_settings(world, refused, tmp_path) -> None:
    some = ["--base", str(world.base), "--prompts", str(world.prompts), "--judge", "sprite_motion", "--out", "x"]
    assert "--settings" in refused([*some, "--tuned", f"same={world.base}"])
    (tmp_path / "config.yaml").write_text((world.run / "config.yaml").read_text("utf-8"), "utf-8")
    assert "no saved weights" in refused([*some, "--tuned", str(tmp_path)])
    assert "is a run folder" in refused([*some, "--base", str(world.run), "--tuned", str(world.run)])
