"""Values, advantages, pruning and costs of trees against hand calculation on small ones.

The tree that most tests use: T = 3, K = 2, splits at steps 0 and 2.

    depth 0         0
    depth 1      0     1
    depth 2      0     1
    depth 3     0 1   2 3
"""

import math

import pytest
import torch

from alignment.tree_advantages import (
    backup,
    better_children,
    counts,
    depth_advantages,
    depth_window,
    extremes,
    forest,
    membership,
)

NAN = math.nan
PARENT = [torch.tensor(rows) for rows in ([0, 0], [0, 1], [0, 0, 1, 1])]
REWARDS = torch.tensor([1.0, 3.0, 5.0, 11.0])
DENSE, MIXED, SPARSE = (0, 3, 6, 9), (0, 4, 8, 12), (0, 5, 10, 15)  # BranchGRPO's presets, for 20 steps


def lists(tensors):
    return [t.tolist() for t in tensors]


def edges(*probabilities):
    return [torch.tensor(p).log() for p in probabilities]


def test_forest_stacks_trees():
    assert lists(forest(1, 3, (0, 2), 2)) == lists(PARENT)
    parent = forest(2, 3, (0, 2), 3)
    assert lists(parent[:2]) == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]]
    assert parent[2].tolist() == [n for n in range(6) for _ in range(3)]
    assert lists(membership(parent)) == [[0, 1], [0] * 3 + [1] * 3, [0] * 3 + [1] * 3, [0] * 9 + [1] * 9]
    assert lists(forest(3, 2, (), 2)) == [[0, 1, 2], [0, 1, 2]]


def test_plain_values_are_means_of_leaves():
    assert lists(backup(PARENT, REWARDS)) == [[5], [2, 8], [2, 8], [1, 3, 5, 11]]


def test_values_weigh_leaves_by_the_probability_of_their_path():
    """Leaves below node 0 of depth 1: 5 * 1 and 5 * 3; below node 1: 2 * 4 and 2 * 4; times 1 and 4 from the root on.
    Node 0: (1 * 1 + 3 * 3) / 4. Root: (5 * 1 + 15 * 3 + 32 * 5 + 32 * 11) / (5 + 15 + 32 + 32)."""
    probabilities = edges([1.0, 4.0], [5.0, 2.0], [1.0, 3.0, 4.0, 4.0])
    values = backup(PARENT, REWARDS, probabilities, beta=1.0)
    assert values[0].tolist() == pytest.approx([562 / 84])
    assert values[1].tolist() == values[2].tolist() == pytest.approx([2.5, 8.0])
    # beta 2 squares the probabilities: 25, 225, then 16 * 4 * 16 twice
    values = backup(PARENT, REWARDS, probabilities, beta=2.0)
    assert values[0].tolist() == pytest.approx([(25 + 225 * 3 + 1024 * 16) / (250 + 2048)])
    assert values[1].tolist() == pytest.approx([(1 + 9 * 3) / 10, 8.0])


def test_limits_of_the_path_weights():
    """Best path: leaf 3 by its last edge, though leaf 1 has the best edge; without weights the plain mean."""
    paths = edges([0.1, 0.9], [0.5, 0.5], [0.1, 0.9, 0.3, 0.7])
    assert lists(backup(PARENT, REWARDS, paths, beta=1e4)) == [[11], [3, 11], [3, 11], REWARDS.tolist()]
    assert lists(backup(PARENT, REWARDS, paths)) == lists(backup(PARENT, REWARDS))
    deterministic = [torch.zeros(len(p)) for p in PARENT]
    assert lists(backup(PARENT, REWARDS, deterministic, beta=3.0)) == lists(backup(PARENT, REWARDS))
    with pytest.raises(ValueError, match="need the log-probabilities"):
        backup(PARENT, REWARDS, beta=1.0)


def test_values_follow_the_definition():
    """On a forest of two trees with 27 leaves each: every node's leaves, found by climbing from each of them."""
    parent, draw = forest(2, 5, (0, 2, 3), 3), torch.Generator().manual_seed(0)
    rewards = torch.randn(54, generator=draw, dtype=torch.float64)
    log_probs = [torch.randn(len(p), generator=draw, dtype=torch.float64) for p in parent]
    values = backup(parent, rewards, log_probs, beta=0.7)
    row, path = torch.arange(54), torch.zeros(54, dtype=torch.float64)
    for depth in reversed(range(5)):
        path, row = path + log_probs[depth][row], parent[depth][row]
        for node in range(len(values[depth])):
            below = row == node
            expected = ((0.7 * path[below]).softmax(0) * rewards[below]).sum()
            torch.testing.assert_close(values[depth][node], expected)


def test_invalid_leaves_are_left_out():
    """The root is the mean of three leaves, 17 / 3, not of its children's values 1 and 8."""
    for bad in (NAN, math.inf, -math.inf):
        values = backup(PARENT, torch.tensor([1.0, bad, 5.0, 11.0]))
        assert values[0].tolist() == pytest.approx([17 / 3])
        assert values[1].tolist() == pytest.approx([1, 8])
        assert values[3].isnan().tolist() == [False, True, False, False]
    values = backup(PARENT, torch.tensor([NAN, NAN, 5.0, 11.0]), edges([0.9, 0.1], [1.0, 1.0], [1.0] * 4), beta=1.0)
    assert values[0].tolist() == pytest.approx([8])
    assert values[1].isnan().tolist() == values[2].isnan().tolist() == [True, False]
    assert backup(PARENT, torch.full((4,), NAN))[0].isnan().all()


def test_advantages_compare_nodes_of_one_depth_and_tree():
    """Depths 1 and 2: values 2 and 8. Depth 3: deviations -4, -2, 0, 6, variance 56 / 4. The root has no one to
    compare with. Rewards of the second tree are those of the first times 1000, in reverse order."""
    parent = forest(2, 3, (0, 2), 2)
    values = backup(parent, torch.cat([REWARDS, 1000 * REWARDS.flip(0)]))
    found = depth_advantages(values, membership(parent))
    std = math.sqrt(14)
    leaves = [-4 / std, -2 / std, 0, 6 / std]
    assert found[0].tolist() == [0, 0]
    assert found[1].tolist() == found[2].tolist() == pytest.approx([-1, 1, 1, -1])
    assert found[3].tolist() == pytest.approx(leaves + leaves[::-1])
    assert depth_advantages(values, membership(parent), clamp=0.5)[3].tolist() == pytest.approx(
        [-0.5, -0.5, 0, 0.5, 0.5, 0, -0.5, -0.5]
    )


def test_every_depth_is_centred_and_scaled():
    parent, draw = forest(3, 20, DENSE, 2), torch.Generator().manual_seed(1)
    found = depth_advantages(backup(parent, torch.rand(48, generator=draw)), membership(parent), clamp=None)
    for depth in range(1, 21):
        by_tree = found[depth].view(3, -1)
        torch.testing.assert_close(by_tree.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
        torch.testing.assert_close(by_tree.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_no_spread_and_no_value_give_no_advantage():
    trees = membership(PARENT)
    assert all(not a.any() for a in depth_advantages(backup(PARENT, torch.full((4,), 0.1)), trees))
    found = depth_advantages(backup(PARENT, torch.tensor([NAN, NAN, 5.0, 11.0])), trees)
    assert lists(found) == [[0], [0, 0], [0, 0], [0, 0, -1, 1]]
    # a spread among the leaves that their parents do not have: 1 and 3, 3 and 1
    found = depth_advantages(backup(PARENT, torch.tensor([1.0, 3.0, 3.0, 1.0])), trees)
    assert lists(found) == [[0], [0, 0], [0, 0], [-1, 1, 1, -1]]


def test_better_children():
    up = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    values = torch.tensor([1.0, 2.0, 2.0, 1.0, 5.0, 5.0, NAN, -9.0, NAN, NAN])
    kept = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0]  # the first of equals, and of two without a value
    assert better_children(values, up).int().tolist() == kept
    of_three = better_children(torch.tensor([3.0, 1.0, 2.0, -2.0, -3.0, -1.0]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert of_three.int().tolist() == [1, 0, 0, 0, 0, 1]


def test_extremes():
    trees = torch.tensor([0] * 6 + [1] * 6)
    values = torch.tensor([3.0, 0.0, 9.0, 4.0, 1.0, 7.0, -3.0, -1.0, -2.0, -6.0, -5.0, -4.0])
    assert extremes(values, trees, 1).nonzero().flatten().tolist() == [1, 2, 7, 9]
    assert extremes(values, trees, 2).nonzero().flatten().tolist() == [1, 2, 4, 5, 7, 8, 9, 10]
    assert extremes(values, trees, 3).all()
    with pytest.raises(ValueError, match="b can be 3"):
        extremes(values, trees, 4)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([NAN, 1.0, 2.0, NAN, 3.0, 4.0], [1, 2, 4, 5]),
        ([NAN, 5.0, 2.0, NAN, 3.0, 4.0], [1, 2, 4, 5]),
        ([1.0, NAN, NAN, NAN, 3.0, 2.0], [0, 1, 4, 5]),  # three have a value, all of them stay
        ([NAN] * 6, [0, 1, 4, 5]),
        ([1.0] * 6, [0, 1, 4, 5]),
    ],
)
def test_extremes_fill_up_with_leaves_without_a_value(values, kept):
    found = extremes(torch.tensor(values), torch.zeros(6, dtype=torch.int64), 2)
    assert found.sum() == 4
    assert {i for i in kept if not math.isnan(values[i])} <= set(found.nonzero().flatten().tolist())


def test_depth_window_slides_to_the_end():
    """Edges whose child has depth 11 to 14 first, one deeper every 30 iterations, 17 to 20 at last."""
    assert depth_window(20, 9, 0) == depth_window(20, 9, 29) == {10, 11, 12, 13}
    assert depth_window(20, 9, 30) == depth_window(20, 9, 59) == {11, 12, 13, 14}
    assert depth_window(20, 9, 179) == {15, 16, 17, 18}
    assert depth_window(20, 9, 180) == depth_window(20, 9, 10_000) == {16, 17, 18, 19}
    assert depth_window(20, 15, 0) == depth_window(20, 15, 500) == {16, 17, 18, 19}
    assert depth_window(8, 3, 5, size=2, every=5) == {5, 6}
    with pytest.raises(ValueError, match="3 steps after the last split, 16,"):
        depth_window(20, 16, 0)


@pytest.mark.parametrize(
    ("splits", "branching", "leaves", "forwards", "edges"),
    [
        (DENSE, 2, 16, 203, 218),
        (MIXED, 2, 16, 169, 184),
        (SPARSE, 2, 16, 135, 150),
        (DENSE, 3, 81, 928, 1008),
        (DENSE, 1, 1, 20, 20),
        ((), 2, 1, 20, 20),
    ],
)
def test_counts_of_the_published_trees(splits, branching, leaves, forwards, edges):
    found = counts(20, splits, branching)
    assert found == (leaves, forwards, edges, forwards)  # siblings share their parent's forward pass in the update too
    parent = forest(1, 20, splits, branching)
    assert sum(len(p) for p in parent) == edges
    assert sum(int(p.max()) + 1 for p in parent) == forwards


def test_counts_of_pruned_trees():
    """After the last split (step 9) there are ten steps of 16 edges: half of them go with half of the chains, 64 with
    four steps. The mix variant trains 2 + 2 + 2 + 4 + 8 + 16 edges of 1 + 2 + 2 + 2 + 4 + 8 parents."""
    assert counts(20, DENSE, 2, kept=8)[2:] == (138, 123)
    assert counts(20, DENSE, 2, trained=set(range(20)) - depth_window(20, 9, 0))[2:] == (154, 139)
    assert counts(20, DENSE, 2, trained={0, 1, 2, 3, *DENSE})[2:] == (34, 19)
    assert counts(20, DENSE, 2, kept=8).forwards == 203


def test_pruning_keeps_the_counted_edges():
    parent, draw = forest(3, 20, DENSE, 2), torch.Generator().manual_seed(2)
    trees, rewards = membership(parent), torch.rand(48, generator=draw)
    values = backup(parent, rewards)
    for keep in (better_children(values[10], parent[9]), extremes(values[20], trees[20], 4)):
        kept = sum(int(keep.sum()) if step > 9 else len(parent[step]) for step in range(20))
        assert kept == 3 * counts(20, DENSE, 2, kept=8).edges
    # the better of two siblings, by their leaves
    better = better_children(values[10], parent[9]).view(-1, 2)
    assert torch.equal(better[:, 0], rewards.view(-1, 2)[:, 0] > rewards.view(-1, 2)[:, 1])
