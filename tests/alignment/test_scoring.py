"""Scores of several rewards: weights, masks, readings beside the totals, and failures that name the reward."""

import pytest
import torch

from alignment.config import Recipe, RewardConfig
from alignment.data import Prompt
from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.scoring import Readings, Scorer, as_matrix, joined, summary
from rewards import RewardError

CODE = """
import torch
from rewards import Scores


def level(videos, prompts, scale=1.0):
    return videos.mean((1, 2, 3, 4)) * scale


def dark_only(videos, prompts):
    values = videos.mean((1, 2, 3, 4))
    return torch.where(values < 0.5, values, torch.nan)


def broken(videos, prompts):
    return {}["judge"]


class Rank:
    name, scope, differentiable = "rank", "group", False

    def __call__(self, clips):
        groups = torch.tensor([clip.group for clip in clips])
        lengths = torch.tensor([float(len(clip.prompt)) for clip in clips])
        return Scores(groups.float(), {"length": lengths, "tag": torch.tensor([clip.meta["tag"] for clip in clips])})


class Batch(Rank):
    scope = "batch"
"""

VIDEOS = torch.tensor([0.1, 0.4, 0.8]).view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4)
PROMPTS = [Prompt("a", {"tag": 1.0}), Prompt("bb", {"tag": 2.0}), Prompt("ccc", {"tag": 3.0})]


@pytest.fixture
def scorer(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(CODE)

    def build(**rewards) -> Scorer:
        made = {n: RewardConfig(f"{path}:{use}", weight, options) for n, (use, weight, options) in rewards.items()}
        return Scorer(Recipe(name="x", rewards=made), torch.device("cpu"))

    return build


def test_the_weighted_sum_counts_trained_rewards_only(scorer):
    score = scorer(a=("level", 2.0, {}), b=("level", -0.5, {"scale": 10.0}), watched=("level", 0.0, {"scale": 99.0}))
    totals = score(VIDEOS, PROMPTS, [0, 0, 0]).totals
    assert torch.allclose(totals["watched"], torch.tensor([9.9, 39.6, 79.2]))
    assert torch.allclose(score.combined(totals), torch.tensor([0.1, 0.4, 0.8]) * (2 - 5))


def test_a_masked_sample_is_masked_in_the_sum_unless_the_reward_is_held_out(scorer):
    score = scorer(a=("level", 1.0, {}), b=("dark_only", 1.0, {}))
    totals = score(VIDEOS, PROMPTS, [0, 0, 0]).totals
    assert torch.allclose(score.combined(totals), torch.tensor([0.2, 0.8, torch.nan]), equal_nan=True)
    score = scorer(a=("level", 1.0, {}), b=("dark_only", 0.0, {}))
    totals = score(VIDEOS, PROMPTS, [0, 0, 0]).totals
    assert totals["b"].isnan().tolist() == [False, False, True]
    assert torch.allclose(score.combined(totals), torch.tensor([0.1, 0.4, 0.8]))


def test_clips_carry_group_prompt_and_meta(scorer):
    readings = scorer(rank=("Rank", 1.0, {}))(VIDEOS, PROMPTS, [4, 4, 7])
    assert readings.totals["rank"].tolist() == [4, 4, 7]
    assert readings.details["reward/rank/length"].tolist() == [1, 2, 3]
    assert readings.details["reward/rank/tag"].tolist() == [1, 2, 3]
    assert torch.allclose(readings.details["image/brightness"], torch.tensor([0.1, 0.4, 0.8]))


def test_the_matrix_holds_every_column_and_means_leave_masks_out(scorer):
    names, matrix = as_matrix(scorer(a=("dark_only", 1.0, {}))(VIDEOS, PROMPTS, [0, 0, 0]), Processes(cpu=True))
    assert names[0] == "reward/a"
    assert matrix.shape == (3, len(names))
    means = summary(names, matrix)
    assert means["reward/a"] == pytest.approx(0.25)
    assert means["image/brightness"] == pytest.approx(1.3 / 3)


def test_batches_are_joined_though_a_reward_answered_nothing_in_one():
    """What a judge that is down leaves: totals that are masked, and no dims."""
    down = Readings({"judge": torch.full((2,), float("nan"))}, {"image/motion": torch.tensor([1.0, 2.0])})
    up = Readings(
        {"judge": torch.tensor([3.0])}, {"image/motion": torch.tensor([4.0]), "reward/judge/ta": torch.ones(1)}
    )
    for parts, order in (([down, up], [0, 1, 2]), ([up, down], [2, 0, 1])):
        found = joined(parts)
        assert found.details["image/motion"].tolist() == [[1, 2, 4][i] for i in order]
        assert found.details["reward/judge/ta"].isnan().tolist() == [[True, True, False][i] for i in order]
        assert found.totals["judge"].isnan().tolist() == [[True, True, False][i] for i in order]


def test_a_reward_that_fails_is_named_with_the_place(scorer, tmp_path):
    line = CODE.splitlines().index('    return {}["judge"]') + 1
    with pytest.raises(RewardError) as caught:
        scorer(quality=("broken", 1.0, {}))(VIDEOS, PROMPTS, [0, 0, 0])
    assert str(caught.value) == f"rewards.quality: KeyError: 'judge' ({tmp_path / 'own.py'}:{line})"


def test_a_reward_over_whole_batches_is_refused(scorer):
    with pytest.raises(UserError, match=r"rewards.all: scope 'batch' is not supported"):
        scorer(all=("Batch", 1.0, {}))
