"""Training of reward models on tiny networks of random weights, and what rewards.load makes of what it leaves."""

import json
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import rewards
from alignment.algorithms import reward_model
from alignment.checkpoint import checkpoints, load_state
from alignment.config import load_recipe
from alignment.data import Stream
from alignment.distributed import Processes
from alignment.metrics import read_metrics
from alignment.optimization import set_rate
from alignment.reward_training.data import in_a_row
from alignment.reward_training.learning import cells_of, centre_of, load, ranked, update
from alignment.run import main, prepare
from alignment.tally import Tally
from rewards.video_files import clip_from_file

from . import reward_recipe as tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Clips, a base and pairs."""
    folder = tmp_path_factory.mktemp("reward_world")
    tiny.write_clips(folder)
    tiny.save_tiny_base(folder / "base")
    tiny.write_rows(folder / "pairs.jsonl", tiny.rows())
    return folder


@pytest.fixture
def recipe(world, tmp_path):
    """Writes a recipe with some of the algorithm's settings; returns its path."""

    def write(preferences="pairs.jsonl", base="base", **algorithm):
        algorithm = {"frames": str(world / "frames"), **algorithm}
        return tiny.write_recipe(tmp_path, world / base, world / preferences, **algorithm)

    return write


def opened(path, *overrides):
    """A run that is ready to train."""
    loaded = load_recipe(path, [*overrides])
    loaded.folder.mkdir(exist_ok=True)
    return prepare(loaded, Processes(cpu=True))


def learned(path, *overrides):
    """The run's folder and its lines of metrics."""
    assert main([str(path), *overrides]) == 0
    folder = path.parent / "run"
    return folder, read_metrics(folder / "metrics.jsonl")


def stepped(run, steps, rate=3e-3):
    """Losses of so many updates, without the loop around them."""
    config, losses = run.recipe.algorithm, []
    given = run.given.chosen("preferences", reward_model.chosen)
    held_out = run.given.chosen("held_out", reward_model.chosen)
    run.policy.describe = partial(reward_model.described, run, held_out)
    set_rate(run.optimizer, rate)
    stream = Stream(given, 0)
    for run.iteration in range(1, steps + 1):
        tally = Tally()
        taken = stream.take((run.iteration - 1) * config.batch_size, config.batch_size)
        update(run, load(run, taken), centre_of(given, len(config.dimensions)), tally)
        losses.append(tally.metrics(run)["loss"])
    return losses


def in_memory(run, files, prompts):
    model = run.policy
    model.learning(False)
    with torch.no_grad():
        return model.scores(model.videos.load((file, None) for file in files), prompts)


@pytest.mark.parametrize("trained", ["lora", "frozen vision", "full"])
def test_what_is_saved_scores_as_it_did_in_training(trained, recipe, world):
    overrides = ["model.trained=full"] if trained == "full" else []
    run = opened(recipe(vision=trained != "frozen vision"), *overrides)
    draw = torch.Generator().manual_seed(0)
    for p in run.policy.parameters.values():  # nothing is as it was
        p.data += 0.05 * torch.randn(p.shape, generator=draw)
    files, prompts = [world / f"{i}.mp4" for i in range(4)], ["a red circle", "b", "cc", "dd"]
    raw = in_memory(run, files, prompts)
    run.policy.describe = lambda: type("D", (), {"step": 7, "norm": {"VQ": (0.5, 2.0), "MQ": (-1.0, 0.5)}})
    folder = run.policy.save(run.folder)
    reward = rewards.load("video_reward", path=str(folder), device="cpu")
    found = reward([clip_from_file(file, prompt) for file, prompt in zip(files, prompts, strict=True)])
    torch.testing.assert_close(found.dims["VQ"], (raw[:, 0] - 0.5) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.dims["MQ"], (raw[:, 1] + 1) / 0.5, atol=1e-5, rtol=1e-5)
    assert raw.std(0).min() > 1e-3
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-7"]


def test_a_run_from_start_to_report(recipe):
    folder, rows = learned(recipe(), "iterations=8", "evaluation.every=4", "ema.decay=0.5")
    assert [row["iteration"] for row in rows] == list(range(9))
    assert rows[-1]["eval/accuracy/mean"] == 1
    assert rows[-1]["loss"] < rows[1]["loss"]
    config = json.loads((folder / "reward/model_config.json").read_text())
    assert config["data_config"]["eval_dim"] == ["VQ", "MQ"]
    page = (folder / "report.html").read_text()
    assert "Of the held-out pairs 100% are ranked right, 62.5% before training." in page
    assert page.count("share ranked right") == 3  # all, VQ, MQ
    assert "No watch on reward hacking" not in page


def test_scores_are_normalised_over_the_held_out_clips(recipe, world):
    """All eight members of the held-out pairs were measured, so that their normalised scores have mean 0, std 1."""
    run = opened(recipe())
    stepped(run, 1)
    run.policy.learning(True)  # as an update that failed leaves it: there is no dropout in what is measured
    reward = rewards.load("video_reward", path=str(run.policy.save(run.folder)), device="cpu")
    members = [(row[side]["video"], row["prompt"]) for row in tiny.rows() for side in "ab"]
    found = reward([clip_from_file(world / video, prompt) for video, prompt in members])
    for values in found.dims.values():
        assert values.mean().item() == pytest.approx(0, abs=1e-3)
        assert values.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "btt"},
        {"loss": "bt", "ties": "skip"},
        {"loss": "regression"},
        {"loss": "btt", "pairs": "all"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_every_loss_learns_what_is_plain_to_see(settings, recipe):
    run = opened(recipe(**settings, batch_size=4))
    losses = stepped(run, 12)
    shares, _ = ranked(run, run.given.chosen("held_out", reward_model.chosen))
    assert shares == {"VQ": 1, "MQ": 1, "mean": 1}
    assert losses[-1] < 0.8 * losses[0]


def test_masked_labels_give_no_gradient(recipe, world):
    """MQ is not labelled: neither its token nor anything behind it moves the loss."""
    rows = [{**row, "labels": {"VQ": row["labels"]["VQ"]}, "scores": {}} for row in tiny.rows()]
    some = [*rows[:1], {**rows[1], "labels": {"MQ": 1}}]
    tiny.write_rows(world / "half.jsonl", some)
    path = recipe("half.jsonl", lora_dropout=0.0, batch_size=1)
    run = opened(path, "data.shuffle=false")
    first = run.given.chosen("preferences", reward_model.chosen)[:1]
    frames = load(run, first)[0].frames
    raw = run.policy.scores(frames, [first[0].record.prompt.text] * 2)
    raw.retain_grad()
    cells_of(run.recipe.algorithm, raw, in_a_row(first, 2), torch.zeros(2)).sum().backward()
    rows = run.policy.parameters["language_model.embed_tokens.rows"].grad
    assert (raw.grad != 0).tolist() == [[True, False]] * 2
    assert rows[0].abs().sum() > 0
    assert rows[1].abs().sum() == 0  # the token of MQ comes last, so that VQ does not see it


STATEFUL = ["iterations=4", "optimizer.warmup=2", "ema.decay=0.9", "evaluation.every=2", "checkpoint.every=1"]


def test_a_run_that_is_resumed_is_the_one_left_alone(recipe, tmp_path):
    path = recipe(pairs="all", batch_size=3)
    alone, whole = learned(path, *STATEFUL, "batch.update=2")
    kept = alone.rename(tmp_path / "alone")
    # The rate depends on the number of iterations with decay alone, so that a shorter run is the first part.
    learned(path, *STATEFUL, "iterations=2", "batch.update=2")
    folder, rows = learned(path, *STATEFUL, "batch.update=2", "--resume")
    clock = ("time/", "samples_per_second")

    def comparable(lines):
        return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in lines]

    assert comparable(rows) == comparable(whole)
    one, two = (load_state(checkpoints(f / "checkpoints")[-1]) for f in (kept, folder))
    assert all(torch.equal(one.trained[name], two.trained[name]) for name in one.trained)
    files = [f / "reward/checkpoint-4/adapter_model.safetensors" for f in (kept, folder)]
    first, second = map(load_file, files)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_do_not_change_the_update(recipe):
    """Of comparisons within pairs, and of all with all, where each micro-batch is run twice."""
    for pairs in ("given", "all"):
        grads = []
        for size in ("null", "1"):
            run = opened(recipe(pairs=pairs, batch_size=4, lora_dropout=0.0), f"batch.update={size}")
            grads.append(gradients(run))
        for name in grads[0]:
            torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-3)


def gradients(run):
    """Of the first iteration's loss, in this process's share alone."""
    given = run.given.chosen("preferences", reward_model.chosen)
    run.apply_update = lambda: run.processes.add_gradients([*run.policy.parameters.values()])
    run.iteration = 1
    share = run.processes.share(given[: run.recipe.algorithm.batch_size])
    update(run, load(run, share), reward_model.centre_of(given, 2), Tally())
    return {name: p.grad for name, p in run.policy.parameters.items() if p.grad is not None}


class Half:
    """One of two processes, which are threads here: what one of them brings the other waits for."""

    is_main, count, device = False, 2, torch.device("cpu")

    def __init__(self, rank, table, barrier):
        self.rank, self.table, self.barrier = rank, table, barrier

    def share(self, items):
        return items[self.rank :: 2]

    def _both(self, value):
        self.table[self.rank] = value
        self.barrier.wait()
        both = list(self.table)
        self.barrier.wait()
        return both

    def gather(self, rows):
        both = self._both(rows)
        dealt = [part[i : i + 1] for i in range(max(map(len, both))) for part in both if i < len(part)]
        return torch.cat(dealt) if dealt else rows

    def total(self, number):
        return float(sum(self._both(number)))

    def any(self, flag):
        return any(self._both(flag))

    def add_gradients(self, parameters):
        grads = [p.grad for p in parameters]
        for p, one, two in zip(parameters, *self._both(grads), strict=True):
            p.grad = None if one is None and two is None else sum(g for g in (one, two) if g is not None)


@pytest.mark.parametrize("pairs", ["given", "all"])
def test_two_processes_are_one(pairs, recipe):
    """Also where one has more pairs than the other."""
    path = recipe(pairs=pairs, batch_size=3, lora_dropout=0.0)
    alone, runs = gradients(opened(path)), [opened(path) for _ in range(2)]
    table, barrier, found = [None, None], threading.Barrier(2, timeout=60), [{}, {}]

    def work(rank):
        runs[rank].processes = Half(rank, table, barrier)
        found[rank] = gradients(runs[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grads in found:
        assert grads.keys() == alone.keys()
        for name, grad in alone.items():
            torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-3)


def test_from_scratch_every_weight_is_trained(recipe):
    run = opened(recipe(from_scratch=True), "model.trained=full")
    before = {name: p.detach().clone() for name, p in run.policy.parameters.items()}
    losses = stepped(run, 8)
    assert losses[-1] < losses[0]
    assert not [name for name, p in run.policy.parameters.items() if torch.equal(p, before[name])]
    assert sum(p.numel() for p in run.policy.core.parameters()) + 32 == sum(p.numel() for p in before.values())


def test_parts_have_their_own_rates(recipe):
    run = opened(recipe(vision_lr=1e-4, merger_lr=2e-4, token_lr=5e-3))
    names = {id(p): name for name, p in run.policy.parameters.items()}
    rates = {}
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            rates[names[id(p)]] = group["share"] * run.recipe.optimizer.lr
    assert rates["visual.patch_embed.proj.weight"] == pytest.approx(1e-4)
    assert rates["visual.merger.mlp.0.weight"] == pytest.approx(2e-4)
    assert rates["language_model.embed_tokens.rows"] == pytest.approx(5e-3)
    assert rates["rm_head.weight"] == pytest.approx(1e-3)
    assert rates["language_model.layers.0.self_attn.q_proj.lora_A.default.weight"] == pytest.approx(1e-3)


def test_gradient_checkpointing_changes_nothing(recipe):
    path = recipe(lora_dropout=0.0)
    plain, saving = (gradients(opened(path, f"model.gradient_checkpointing={flag}")) for flag in ("false", "true"))
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], atol=1e-6, rtol=1e-4)


def test_early_stop_keeps_the_best_weights(recipe, monkeypatch):
    shares = iter([0.5, 0.9, 0.8, 0.7])
    monkeypatch.setattr(reward_model, "ranked", lambda run, held_out: ({"VQ": (s := next(shares)), "mean": s}, 1.0))
    watch = ["evaluation.every=1", "evaluation.patience=2", "evaluation.watch=VQ", "iterations=9"]
    folder, rows = learned(recipe(), *watch)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert (folder / "reward/checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "algorithm.loss: 'hinge' is none of btt, bt"),
        ({"dimensions": ["VQ", "Beauty"]}, "no label of Beauty; set algorithm.dimensions to what is labelled: MQ, VQ"),
        ({"pairs": "all", "loss": "regression"}, "algorithm.pairs: all is for losses that compare"),
        ({"loss": "yes_no"}, "yes_no answers one question, not 2"),
        ({"template": "/nowhere.txt"}, "/nowhere.txt"),
        ({"from_scratch": True}, "set model.trained to full"),
        ({"positions": "odd"}, "none of null, row, native"),
        ({"theta": 1.0}, "theta: 1.0 is not above 1"),
        ({"dimensions": ["VQ", "mean"]}, "choose another name"),
    ],
)
def test_settings_that_cannot_learn_are_one_line(settings, message, recipe, capsys):
    assert main([str(recipe(**settings)), "--check"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_prompt_with_a_special_token_and_a_clip_that_is_a_latent_are_refused(recipe, world, capsys):
    from safetensors.torch import save_file

    bad = [{**tiny.rows()[0], "prompt": "a <|video_pad|> b"}, *tiny.rows()[1:]]
    tiny.write_rows(world / "special.jsonl", bad)
    assert main([str(recipe("special.jsonl")), "--check"]) == 2
    assert "special.jsonl line 1: " in capsys.readouterr().err
    save_file({"state": torch.zeros(1)}, world / "latent.safetensors")
    tiny.write_rows(world / "latent.jsonl", [{**tiny.rows()[0], "a": {"latent": "latent.safetensors"}}])
    assert main([str(recipe("latent.jsonl")), "--check"]) == 2
    assert "a member has a latent alone" in capsys.readouterr().err


def test_rewards_and_a_lack_of_held_out_pairs_are_refused(recipe, capsys):
    assert main([str(recipe()), "--check", "data.held_out=null"]) == 2
    assert "data.held_out: names no file" in capsys.readouterr().err
    assert main([str(recipe()), "--check", "rewards.motion.use=sprite_motion"]) == 2
    assert "trains one and asks none" in capsys.readouterr().err
    assert main([str(recipe()), "--check", "evaluation.watch=TA"]) == 2
    assert "is no dimension of this recipe" in capsys.readouterr().err
