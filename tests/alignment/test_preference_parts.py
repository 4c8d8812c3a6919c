"""What each preference algorithm adds to the shared update, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from alignment.algorithms import dense_dpo, flow_dpo, flow_rwr, gapo, seppo, sft
from alignment.data import Group, Member, Pair, Prompt
from alignment.errors import UserError
from alignment.preference import watch_pairs
from alignment.tally import Tally
from alignment.weighted import Video, given_videos, worth_imitating
from tests.alignment.tiny import make_policy, make_run

NAN = math.nan
RED, BLUE = Prompt("a red circle", {}), Prompt("a blue square", {})


def fake_run(config, records=(), **fields):
    """What the parts look at of a run."""
    data = SimpleNamespace(preferences="pairs.jsonl", held_out=None)
    recipe = SimpleNamespace(algorithm=config, data=data, iterations=10, fps=8)
    given = SimpleNamespace(
        encoder=SimpleNamespace(latent_frames=5, video_shape=(9, 3, 32, 32)),
        chosen=lambda key, choose: choose(recipe, records, "data.preferences: pairs.jsonl"),
    )
    return SimpleNamespace(recipe=recipe, given=given, **fields)


def pair(label=1, scores=None, prompt=RED, **fields):
    return Pair("p", prompt, Member(None, "a"), Member(None, "b"), label, scores or {}, {}, line=3, **fields)


# --- sft and flow_rwr -----------------------------------------------------------------------------------------------


def test_best_of_each_group_and_none_of_a_tie_or_a_mask():
    rewards = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.3, 0.3, NAN, 0.2, 0.4, NAN, NAN, NAN, NAN, 0.7, NAN])
    assert sft.best_of_groups(rewards, 3).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_videos_worth_imitating():
    members = [Member(None, name) for name in "abcdefghi"]
    scores = [(0, 1.0), (0, 0.0), (1, 0.5), (1, 0.5), (2, None), (2, None), (3, 2.0), (3, 10.0), (3, None)]
    videos = [Video(RED, m, record, 0, score) for m, (record, score) in zip(members, scores, strict=True)]
    # The better of a pair, none of a tie, all of a group without scores, and 10 rather than 2.
    assert [video.member.latent for video in worth_imitating(videos)] == ["a", "e", "f", "h"]


def test_scores_of_given_videos():
    members = tuple(Member(None, name) for name in "xyz")
    records = [
        pair(label=-1),
        pair(scores={"vq": (1.0, 3.0), "mq": (0.0, 1.0)}),
        Group("g", BLUE, members, {"vq": (1.0, None, 2.0)}),
    ]
    found = given_videos(fake_run(sft.Config()).recipe, records)
    assert [video.score for video in found] == [0, 1, 0.5, 2.0, 1.0, None, 2.0]
    assert [video.group for video in found] == [0, 0, 0, 0, 1, 1, 1]
    by_vq = given_videos(fake_run(sft.Config(dimension="vq")).recipe, records[1:2])
    assert [video.score for video in by_vq] == [1.0, 3.0]


def test_weights_of_sampled_videos_leave_masked_ones_out():
    logged = {}
    run = fake_run(flow_rwr.Config(group_size=2, max_weight=10.0), log=logged.update)
    weights = flow_rwr.weights_of(run, torch.tensor([1.0, 3.0, NAN, 5.0]))
    # z of the first group is -1 and 1, of the second, with one known, 0; weights exp(z) over their mean.
    raw = torch.tensor([math.exp(-1), math.exp(1), 0.0, 1.0], dtype=torch.float64)
    wanted = raw / (raw.sum() / 3)
    assert torch.allclose(weights, wanted)
    effective = float(wanted.sum() ** 2 / wanted.square().sum() / 3)
    assert logged["weight/effective"] == pytest.approx(effective)


# --- gapo -----------------------------------------------------------------------------------------------------------


def test_gapo_weighs_by_scaled_scores():
    config = gapo.Config(score_range=[0, 100])
    assert gapo.weight(config, 100, 0) == pytest.approx(1.0)
    assert gapo.weight(config, 80, 60) == pytest.approx(2**0.8 - 2**0.6)
    assert gapo.weight(config, 150, -5) == pytest.approx(1.0)  # beyond the range: its ends
    assert gapo.weight(config, 40, 40) == 0


# --- flow_dpo -------------------------------------------------------------------------------------------------------


def test_beta_by_level_and_by_gap():
    batch = SimpleNamespace(levels=torch.tensor([0.0, 0.5]), gaps=torch.tensor([1.0, 2.0]))
    run = fake_run(flow_dpo.Config(beta=100, beta_schedule="flow"), iteration=10)
    assert flow_dpo.betas(run, batch).tolist() == [100, 25]
    run = fake_run(flow_dpo.Config(beta=100, gap_beta=True), iteration=10)  # the last iteration: half
    wanted = [50 * (2 / (1 + math.exp(-gap)) - 1) for gap in (1, 2)]
    assert flow_dpo.betas(run, batch).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        ("dpo", lambda z: math.log1p(math.exp(-z))),
        ("poly", lambda z: math.log1p(math.exp(-z)) + 2 / (1 + math.exp(z))),
        ("ipo", lambda z: ((z - 0.5) / 4) ** 2),
    ],
)
def test_losses_weights_and_anchor(loss, wanted):
    config = flow_dpo.Config(beta=4, loss=loss, poly_alpha=2, anchor=0.1)
    batch = SimpleNamespace(levels=torch.tensor([0.2, 0.7]), weights=torch.tensor([1.0, 3.0]))
    errors, reference = torch.tensor([[0.5, 0.9], [1.2, 0.4]]), torch.tensor([[0.6, 0.8], [1.0, 0.5]])
    found = flow_dpo.losses(fake_run(config), Tally(), errors, reference, batch)
    zs = [-2 * (-0.1 - 0.1), -2 * (0.2 + 0.1)]
    expected = [weight * wanted(z) + 0.1 * error for weight, z, error in zip([1, 3], zs, [0.5, 1.2], strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_ipo_refuses_a_beta_that_vanishes(tmp_path):
    config = flow_dpo.Config(loss="ipo", gap_beta=True)
    run = make_run(tmp_path, make_policy(sampler={"kernel": "ode", "shared_noise": False}), config)
    assert any("ipo divides by beta" in line for line in flow_dpo.check(run.recipe))
    config.gap_beta = False
    assert flow_dpo.check(run.recipe) == []


# --- dense_dpo ------------------------------------------------------------------------------------------------------


def labelled(*pairs):
    return dense_dpo.labelled(fake_run(dense_dpo.Config(), pairs), "preferences")


def test_labels_of_latent_frames():
    (found,) = labelled(pair(segment_seconds=0.5, segment_labels=(1, -1)), pair())
    assert found.labels == (1, 1, 1, -1, -1)
    (found,) = labelled(pair(segment_seconds=0.5, segment_labels=(1, -1, 1, 1)))  # a second longer than what is seen
    assert found.labels == (1, 1, 1, -1, -1)


def test_pairs_with_hardly_a_label_are_left_out():
    with pytest.raises(UserError, match="more than 20% of its segments"):
        labelled(pair(segment_seconds=0.2, segment_labels=(1, 0, 0, 0, 0)))


def test_errors_of_the_better_member_in_each_frame():
    errors = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    labels = torch.tensor([[1, 0, -1]])
    # Frame 0: the first is better, frame 2: the second; frame 1 is a tie.
    assert dense_dpo.oriented(errors, labels).tolist() == [[(1 + 30) / 2, (10 + 3) / 2]]


# --- seppo ----------------------------------------------------------------------------------------------------------


def test_checkpoints_are_kept_and_drawn(tmp_path):
    policy = make_policy(sampler={"kernel": "ode", "shared_noise": False})
    run = make_run(tmp_path, policy, seppo.Config(checkpoints=2, keep_every=3))
    drawn = {}
    for iteration in range(1, 13):
        run.iteration = iteration
        seppo.keep_checkpoint(run)
        drawn[iteration] = seppo.draw_reference(run)
        newest = (iteration - 1) // 3
        assert set(run.snapshots) == {f"checkpoint_{n}" for n in (newest - 1, newest) if n >= 0}
        name, age = drawn[iteration]
        assert name in run.snapshots
        assert age == iteration - 1 - 3 * int(name.rpartition("_")[2])
    assert len({name for name, _ in drawn.values()}) == 4


# --- what all log ---------------------------------------------------------------------------------------------------


def test_pairs_are_watched():
    tally = Tally()
    margin, levels = torch.tensor([1.0, -3.0, 0.0]), torch.tensor([0.1, 0.3, 1.0])
    errors, reference = torch.tensor([[1.1, 1.0], [2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 1.0]]).expand(3, 2)
    watch_pairs(tally, margin, errors, reference, levels)
    found = tally.metrics(SimpleNamespace(policy=SimpleNamespace(device="cpu"), processes=Alone()))
    assert found["implicit_accuracy"] == pytest.approx(0.5)
    assert found["margin"] == pytest.approx(-2 / 3)
    assert found["margin/size"] == pytest.approx(4 / 3)
    assert found["error/winner"] == pytest.approx(4.1 / 3)
    assert found["error/loser"] == pytest.approx(4 / 3)
    assert [found[f"margin/levels_{low}"] for low in ("0.00_0.25", "0.25_0.50", "0.75_1.00")] == [1, -3, 0]


class Alone:
    def gather(self, rows):
        return rows

    def union(self, names):
        return names
