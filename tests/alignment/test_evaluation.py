"""Held-out evaluation: paired, deterministic, on the pipeline's own scheduler; videos that play."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from alignment.config import load_recipe
from alignment.distributed import Processes
from alignment.evaluation import as_bytes, evaluate, evaluation_words, write_video
from alignment.gains import number
from alignment.run import prepare
from samplers import SDEScheduler


@pytest.fixture
def session(write, recipe):
    """A run that is ready to train, with overrides."""

    def start(*overrides):
        loaded = load_recipe(write(), list(overrides))
        loaded.folder.mkdir(exist_ok=True)
        return prepare(loaded, Processes(cpu=True))

    return start


def scores(run, iteration):
    return json.loads((run.folder / "samples" / f"{iteration:06d}" / "scores.json").read_text())


NO_GAIN = {"eval/gain": 0, "eval/gain/low": 0, "eval/gain/high": 0}


def test_words_of_an_evaluation():
    found = {"eval/reward/mean": 0.5, "eval/gain": 0.1, "eval/gain/low": -0.02, "eval/gain/high": 0.22}
    assert evaluation_words(found) == "reward 0.5000  gain +0.100 (95 % -0.020 to +0.220)"
    pairs = {"eval/reward/mean": 0.5, "eval/pairs/implicit_accuracy": 0.625}
    assert evaluation_words(pairs) == "reward 0.5000  held-out pairs told apart 62.5%"


def test_two_evaluations_of_the_same_weights_are_equal(session):
    run = session()
    torch.manual_seed(1)
    first = run.evaluate(0)
    torch.manual_seed(2)
    assert run.evaluate(1) == first | NO_GAIN
    before, after = scores(run, 0), scores(run, 1)
    assert before["values"] == after["values"]
    assert before["seeds"] == after["seeds"]
    mp4 = [(run.folder / "samples" / f"{i:06d}" / "00.mp4").read_bytes() for i in range(2)]
    assert mp4[0] == mp4[1]


def test_changed_weights_change_the_evaluation(session):
    run = session()
    first = evaluate(run, 0)
    with torch.no_grad():
        for p in run.policy.parameters.values():
            p.add_(0.5)
    assert evaluate(run, 1)["eval/reward/bright"] != first["eval/reward/bright"]


def test_the_pipelines_own_scheduler_is_used_and_no_noise_is_drawn(session, monkeypatch):
    drawn, ran = [], []
    draw = SDEScheduler.draw
    monkeypatch.setattr(
        SDEScheduler, "draw", lambda self, moment: (drawn.append(moment.step.std), draw(self, moment))[1]
    )
    run = session()
    assert any(std > 0 for std in drawn)  # the self-check rolls out: the spy works
    drawn.clear()
    stock = type(run.policy.stock)
    step = stock.step
    monkeypatch.setattr(stock, "step", lambda self, *a, **k: (ran.append(type(self)), step(self, *a, **k))[1])
    evaluate(run, 0)
    assert not any(std > 0 for std in drawn)
    assert ran == [stock] * 3
    ran.clear()
    evaluate(session("evaluation.steps=5"), 0)
    assert ran == [stock] * 5
    assert not issubclass(stock, SDEScheduler)


def test_the_average_is_what_is_evaluated(session):
    run = session("ema.decay=0.5")
    with torch.no_grad():
        for name, p in run.policy.parameters.items():
            run.average.weights[name] = p.detach().clone()
            p.add_(0.5)
    averaged, raw = run.evaluate(0), evaluate(run, 1)
    assert averaged["eval/reward/bright"] != raw["eval/reward/bright"]
    assert averaged | NO_GAIN == session().evaluate(2)


def test_the_gain_is_paired_with_the_first_evaluation(session, capsys):
    """Also where others lie between, and not where the first one had other prompts."""
    run = session("evaluation.num_prompts=5")
    assert "eval/gain" not in run.evaluate(0)
    for iteration in (1, 2):
        with torch.no_grad():
            for p in run.policy.parameters.values():
                p.add_(0.5)
        found = run.evaluate(iteration)
        changes = np.subtract(*(scores(run, i)["values"]["reward/mean"] for i in (iteration, 0)))
        assert found["eval/gain"] == pytest.approx(changes.mean())
        assert changes.min() <= found["eval/gain/low"] < found["eval/gain"] < found["eval/gain/high"] <= changes.max()
        assert f"  gain {number(changes.mean(), True)} (95 % " in capsys.readouterr().out
    assert "eval/gain" not in run.evaluate(0)
    first = run.folder / "samples" / "000000" / "scores.json"
    first.write_text(json.dumps(scores(run, 0) | {"seeds": [0] * 5}))
    assert "eval/gain" not in run.evaluate(3)


def test_number_and_size_of_batches_change_nothing(session):
    options = ("evaluation.num_prompts=5", "evaluation.videos=4")
    whole, parts = session(*options), session(*options, "evaluation.batch=2")
    evaluate(whole, 0)
    evaluate(parts, 1)
    one, other = scores(whole, 0), scores(parts, 1)
    assert one["values"].keys() == other["values"].keys()
    for name, column in one["values"].items():
        if name != "reward/noisy":
            assert np.allclose(column, other["values"][name], rtol=1e-4), name
    assert len(list((parts.folder / "samples" / "000001").glob("*.mp4"))) == 4


def test_what_is_recorded(session):
    run = session("evaluation.num_prompts=5", "rewards.bright.use=sprite_motion")
    means = evaluate(run, 7)
    record = scores(run, 7)
    assert record["iteration"] == 7
    assert record["prompts"] == ["a red circle", "a blue square", "a green dot", "a red circle", "a blue square"]
    assert len(set(record["seeds"])) == 5
    assert record["trained"] == {"bright": 1.0}
    assert record["held_out"] == ["contrast", "noisy"]
    assert record["videos"] == ["00.mp4"]
    for name in ("reward/mean", "reward/bright", "reward/contrast", "image/motion"):
        column = [v for v in record["values"][name] if v is not None]
        assert len(record["values"][name]) == 5
        if column:
            assert means[f"eval/{name}"] == pytest.approx(np.mean(column), rel=1e-5)


def test_a_repeated_prompt_gets_other_noise(session):
    run = session("evaluation.num_prompts=4")
    evaluate(run, 0)
    values = scores(run, 0)["values"]["reward/bright"]
    assert values[0] != values[3]


def test_every_clip_is_a_group_of_its_own(session, rewards_file):
    run = session("evaluation.num_prompts=5", "evaluation.batch=2", f"rewards.contrast.use={rewards_file}:Group")
    evaluate(run, 0)
    assert scores(run, 0)["values"]["reward/contrast"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch", [2, 5])
def test_a_win_rate_is_one_against_the_first_evaluation(session, rewards_file, batch):
    judge = f"rewards.contrast.options={{judge: {{use: '{rewards_file}:brightness'}}}}"
    run = session(
        "evaluation.num_prompts=5",
        f"evaluation.batch={batch}",
        "rewards.contrast.use=win_rate",
        judge,
        "batch.rollout=1",
    )
    evaluate(run, 0)
    assert scores(run, 0)["values"]["reward/contrast"] == [0.5] * 5  # each against itself
    with torch.no_grad():
        for p in run.policy.parameters.values():
            p.add_(5.0)  # a change that shows in bytes
    evaluate(run, 1)
    before, after = (scores(run, iteration)["values"] for iteration in (0, 1))
    rows = list(zip(after["reward/contrast"], after["reward/bright"], before["reward/bright"], strict=True))
    clear = [(rate, float(new > old)) for rate, new, old in rows if abs(new - old) > 5e-3]  # that shows in bytes
    assert len(clear) >= 3
    assert all(rate == won for rate, won in clear)
    assert len(scores(run, 1)["videos"]) == len(scores(run, 0)["videos"]) == 1


def test_masked_values_are_null(session):
    run = session("rewards.bright.options.at=1", "rewards.bright.options.trouble=all nan")
    means = evaluate(run, 0)
    assert scores(run, 0)["values"]["reward/bright"] == [None, None]
    assert np.isnan(means["eval/reward/bright"])
    assert np.isfinite(means["eval/reward/contrast"])


@pytest.mark.parametrize("size", [(16, 16), (30, 50), (256, 270), (257, 301)])
def test_videos_play(tmp_path, size):
    video = torch.zeros(5, 3, *size)
    video[:, 0, : size[0] // 2] = 1.0  # red above, black below
    write_video(tmp_path / "x.mp4", as_bytes(video), fps=8)
    frames = iio.imread(tmp_path / "x.mp4")
    assert len(frames) == 5
    assert min(frames.shape[1:3]) >= 256
    assert frames.shape[2] / frames.shape[1] == pytest.approx(size[1] / size[0], abs=0.02)
    above, below = frames[:, : frames.shape[1] // 2 - 8], frames[:, frames.shape[1] // 2 + 8 :]
    assert above.mean((0, 1, 2)) == pytest.approx([255, 0, 0], abs=8)
    assert below.mean((0, 1, 2)) == pytest.approx([0, 0, 0], abs=8)
    assert iio.immeta(tmp_path / "x.mp4")["fps"] == 8
