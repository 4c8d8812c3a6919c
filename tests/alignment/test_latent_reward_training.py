"""Training of latent rewards: through the command, and its parts by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from alignment.algorithms import latent_reward
from alignment.checkpoint import checkpoints, load_state
from alignment.config import load_recipe
from alignment.data import Group, read_preferences, save_latent
from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.latent_reward import LatentReward
from alignment.latent_reward.accuracy import share
from alignment.latent_reward.model import WEIGHTS
from alignment.metrics import read_metrics
from alignment.pairs import example_of
from alignment.preference import batches
from alignment.run import main, prepare
from benchmarks import latent_reward as figure
from samplers import seed_for
from tests.alignment.preference_data import PAIRS, PROMPTS, ran, recipe_for, write_recipe, write_rows
from tests.alignment.tiny import shake

ALGORITHM = {"name": "latent_reward", "layer": 1, "dimensions": ["look", "Overall"], "batch_size": 3, "head_lr": 3e-3}
ALGORITHM |= {"loss": "btt", "level_law": "uniform"}


def written(folder, base, preferences, **algorithm):
    data = {key: str(preferences / "latents.jsonl") for key in ("preferences", "held_out")}
    recipe = recipe_for(base, {**ALGORITHM, **algorithm}, data)
    del recipe["rewards"]
    return write_recipe(folder / "recipe.yaml", recipe)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base, preferences):
    return written(tmp_path_factory.mktemp("latent_reward"), base, preferences)


@pytest.fixture(scope="module")
def alone(recipe):
    """The folder of an uninterrupted run."""
    return ran(recipe, recipe.parent / "alone")


def trained(folder):
    return load_state(checkpoints(folder / "checkpoints")[-1]).trained


def distance(one, two):
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_two_iterations(alone):
    before, *rows = read_metrics(alone / "metrics.jsonl")
    assert [row["iteration"] for row in (before, *rows)] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 and math.isfinite(row["loss"]) for row in rows)
    assert rows[0]["lr"] == 1e-3
    for row in (before, rows[-1]):
        shares = {key: value for key, value in row.items() if key.startswith("eval/")}
        assert set(shares) >= {"eval/accuracy/mean", "eval/accuracy/look", "eval/levels_0.75_1.00/look"}
        assert shares["eval/levels_0.00_0.25/mean/low"] <= shares["eval/levels_0.00_0.25/mean"]
        assert all(value is not None and 0 <= value <= 1 for value in shares.values())
    assert "By noise level" in (alone / "report.html").read_text("utf-8")
    saved = load_file(alone / "latent_reward" / WEIGHTS)
    assert distance(saved, trained(alone)) == 0
    card = json.loads((alone / "latent_reward/reward.json").read_text())
    assert (card["layer"], card["dimensions"], card["fps"]) == (1, ["look", "Overall"], 8)


def test_the_count_is_what_is_trained(recipe, alone, capsys):
    numbers = {}
    for kind in ("lora", "full"):
        assert main([str(recipe), f"model.trained={kind}", "--check"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "trained parameters" in line)
        numbers[kind] = int(line.split("trained parameters ")[1].split(maxsplit=1)[0].strip(",").replace(",", ""))
    assert numbers["lora"] == sum(w.numel() for w in trained(alone).values())
    session = session_of(recipe, "model.trained=full")
    assert numbers["full"] == sum(p.numel() for p in session.policy.parameters.values())


def session_of(recipe, *overrides):
    """A run that is ready to train."""
    loaded = load_recipe(recipe, [f"output={recipe.parent / 'session'}", *overrides])
    loaded.folder.mkdir(exist_ok=True)
    session = prepare(loaded, Processes(cpu=True))
    session.iteration, session.row = 1, {}
    shake(session.policy)
    return session


@pytest.fixture(scope="module")
def session(recipe):
    return session_of(recipe)


def batch_of(session, exchanged=False):
    """Two pairs at drawn levels; with their members the other way round."""
    items = session.given.chosen("preferences", latent_reward.chosen)[:2]
    examples = [example_of(session, item, 7 + i) for i, item in enumerate(items)]
    if exchanged:
        examples = [e._replace(load=lambda e=e: (e.load()[0].flip(0), None)) for e in examples]
    (batch,) = batches(session, examples)
    return batch


def test_held_out_prompts_are_embedded_before_the_encoders_go(recipe, preferences, tmp_path):
    rows = [json.loads(line) for line in (preferences / "latents.jsonl").read_text("utf-8").splitlines()]
    for row in rows[:2]:
        row["prompt"] = "a prompt of its own"
        for member in "ab":
            row[member]["latent"] = str(preferences / row[member]["latent"])
    held_out = write_rows(tmp_path / "held_out.jsonl", rows[:2])
    loaded = session_of(recipe, "model.drop_encoders=true", f"data.held_out={held_out}")
    assert loaded.policy.pipe.text_encoder is None
    assert latent_reward.evaluate(loaded, 0)["eval/accuracy/mean"] >= 0


def test_members_share_level_and_noise(session):
    batch = batch_of(session)
    state, clean = batch.trajectory.steps[0].x.unflatten(0, (2, 2)), batch.clean.unflatten(0, (2, 2))
    levels = batch.trajectory.levels[0]
    assert levels[0] == levels[1] != levels[2] == levels[3]
    for pair, level in enumerate(levels[::2]):
        first, second = (state[pair, i] - (1 - level) * clean[pair, i] for i in range(2))
        assert torch.allclose(first, second, atol=1e-5)
        assert (first / level).std() == pytest.approx(1, abs=0.2)


def test_exchanged_members_flip_the_sign(session):
    with torch.no_grad():
        there, back = (latent_reward.differences(session, batch_of(session, flip)) for flip in (False, True))
    assert there.shape == (2, 2)
    assert there.abs().max() > 1e-3
    assert torch.allclose(there, -back, atol=1e-6)


def test_update_is_the_mean_over_cells(session):
    """Against the losses of the pairs one by one, by the model with ties written out."""
    examples = next(latent_reward.given_examples(session, session.given.chosen("preferences", latent_reward.chosen))())
    found = []
    with torch.no_grad():
        for batch in (batch for example in examples for batch in batches(session, [example])):
            found.append((latent_reward.differences(session, batch)[0], batch.labels[0]))
    theta, cells = session.recipe.algorithm.theta, []
    for difference, labels in found:
        for d, label in zip(difference.double().tolist(), labels.tolist(), strict=True):
            first, second = 1 / (1 + theta * math.exp(-d)), 1 / (1 + theta * math.exp(d))
            chance = {1: first, -1: second, 0: (theta**2 - 1) * first * second}
            cells.append(-math.log(chance[label]))
    tally = latent_reward.Tally()
    latent_reward.update(session, examples, tally)
    assert len(cells) == 6
    assert tally.metrics(session)["loss"] == pytest.approx(sum(cells) / 6, rel=1e-5)


def test_learns_what_tells_pairs_apart(tmp_path, base, preferences):
    """The better state lies higher: held-out pairs of others are ranked right at all but the highest levels."""
    shape = load_file(next((preferences / "latent").iterdir()))["state"].shape
    draw, rows = torch.Generator().manual_seed(0), []
    for i in range(12):
        label = 1 - 2 * (i % 2)
        for side, sign in (("a", label), ("b", -label)):
            save_latent(tmp_path / f"{i}{side}.safetensors", 0.5 * torch.randn(shape, generator=draw) + 0.7 * sign)
        files = {side: {"latent": f"{i}{side}.safetensors"} for side in "ab"}
        rows.append({"id": str(i), "prompt": PROMPTS[i % 2], **files, "label": label})
    write_rows(tmp_path / "pairs.jsonl", rows[:8])
    write_rows(tmp_path / "held_out.jsonl", rows[8:])
    recipe = written(tmp_path, base, tmp_path, dimensions=["Overall"], loss="bt", batch_size=8)
    data = [f"data.{key}={tmp_path}/{name}.jsonl" for key, name in (("preferences", "pairs"), ("held_out",) * 2)]
    folder = ran(recipe, tmp_path / "run", *data, "iterations=12", "optimizer.lr=1e-2", "algorithm.head_lr=1e-2")
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["loss"] < 0.3
    assert last["eval/levels_0.00_0.25/mean"] == last["eval/levels_0.25_0.50/mean"] == 1


def test_accuracy_by_level(alone, preferences, tmp_path, capsys):
    """The command's shares against members scored one by one: four decided pairs, and a tie."""
    out = tmp_path / "figure"
    arguments = [f"tiny={alone}", "--pairs", str(preferences / "latents.jsonl"), "--out", str(out)]
    assert figure.main([*arguments, "--levels", "0.3", "--batch", "2"]) == 0
    record = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert record["versions"]
    assert "data:image/png;base64," in out.with_suffix(".html").read_text("utf-8")
    reward, right = LatentReward.load(alone), []
    for row, (prompt, scores, _) in enumerate(PAIRS):
        noise = torch.Generator().manual_seed(seed_for("latent_reward", 0.3, row))
        states = [load_file(preferences / f"latent/{2 * row + i}.safetensors")["state"] for i in range(2)]
        noise = torch.randn(states[0].shape, generator=noise)
        a, b = (float(reward.score((0.7 * x + 0.3 * noise)[None], 0.3, [PROMPTS[prompt]])[0, 0]) for x in states)
        if scores[0] != scores[1]:
            right.append((a > b) == (scores[0] > scores[1]))
    (found,) = record["runs"]["tiny"]["look"]
    assert (found["level"], found["pairs"], found["accuracy"]) == (0.3, 4, sum(right) / 4)
    assert figure.main([f"tiny={tmp_path}", *arguments[1:]]) == 2
    assert "holds no reward.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.layer=2", "algorithm.layer: 2 is not between 1 and 1"),
        ("algorithm.dimensions=[gloss]", "no pair is decided by gloss; annotate them, or change algorithm.dimensions"),
        ("algorithm.dimensions=[mean]", "algorithm.dimensions: ['mean'] is not one or more names, each once"),
        ("algorithm.loss=mse", "algorithm.loss: 'mse' is none of bt, btt"),
        ("algorithm.ties=keep", "algorithm.ties: 'keep' is none of"),
        ("algorithm.theta=1", "algorithm.theta: 1.0 is not above 1"),
        ("algorithm.tie_eps=-1", "algorithm.tie_eps: -1.0 is below 0"),
        ("algorithm.head_lr=0", "algorithm.head_lr: 0.0 is not above 0"),
        ("data.held_out=null", "data.held_out: that a reward is right on pairs that it has learned says nothing"),
        ("model.lora.targets=[to_qkv]", "model.lora.targets: 'to_qkv' matches no layer of transformer"),
    ],
)
def test_recipes_that_cannot_be(recipe, override, said, capsys):
    assert main([str(recipe), override, "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_groups_are_compared_two_by_two(preferences):
    """The one scored 0.3 and 0.8 in their order; the third has no score."""
    groups = [record for record in read_preferences(preferences / "latents.jsonl") if isinstance(record, Group)]
    recipes = [SimpleNamespace(algorithm=latent_reward.Config(dimensions=[name])) for name in ("look", "gloss")]
    (found,) = latent_reward.chosen(recipes[0], groups, "here")
    assert found.labels == (-1,)
    assert [member.latent.name for member in found.pair.members] == ["10.safetensors", "11.safetensors"]
    with pytest.raises(UserError, match="here: no pair is decided by gloss"):
        latent_reward.chosen(recipes[1], groups, "here")


def test_share_by_hand():
    """Wilson's interval of 8 of 10: the roots of (p - 0.8)^2 = z^2 p (1 - p) / 10."""
    found = share(torch.tensor([1.0] * 8 + [0.0] * 2 + [math.nan]))
    assert (found.mean, found.num) == (pytest.approx(0.8), 10)
    for end in (found.low, found.high):
        assert (end - 0.8) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 10, rel=1e-6)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert math.isnan(share(torch.tensor([math.nan])).mean)
