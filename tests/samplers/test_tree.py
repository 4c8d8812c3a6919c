"""Trees: what they record, how their noise is shared, and that they are rollouts where they do not branch."""

import math

import diffusers
import pytest
import torch
from torch.distributions import Normal

from samplers import Trajectory, grow, replay, rollout, sde_scheduler, transitions
from samplers.schedulers import FlowSDEScheduler, Moment
from samplers.tree import Node, brancher, segment_steps
from tests.pipelines import FAMILIES, STEPS, denoisers

from .grids import uniform

LATENT_SEEDS, NOISE_SEEDS, SPREAD = [11, 12], [21, 22], 4.0
NOISY = range(STEPS - 1)


@pytest.fixture(scope="module", params=["wan", "ltx_image_to_video", "stable_diffusion_3"])
def policy(request):
    """(pipe, call); the second one takes no initial state."""
    pipe, call = FAMILIES[request.param]()
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6)
    return pipe, {**call, "output_type": "latent"}


@pytest.fixture(scope="module")
def grown(policy):
    return tree(policy)


def rows_of(call, rows) -> dict:
    """The call for other rows than its two."""
    more = {"image": call["image"][rows]} if "image" in call else {}
    return {**call, "prompt": [call["prompt"][row] for row in rows], **more}


def tree(policy, splits=(0, 2), branching=2, trees=(0, 1), record=NOISY, **more):
    pipe, call = policy

    def roll(rows, **options):
        return rollout(pipe, record, **{**rows_of(call, [trees[row] for row in rows]), **options})

    seeds = [LATENT_SEEDS[t] for t in trees], [NOISE_SEEDS[t] for t in trees]
    with torch.no_grad():
        return grow(roll, STEPS, splits, branching, SPREAD, *seeds, **more)


def recorded(forest):
    return [step for segment in forest.segments for step in segment.steps]


@pytest.mark.parametrize("splits", [(), (1,), (0, 2, 3)], ids=str)
def test_without_branches_it_is_the_rollout(policy, splits):
    """Bit for bit, whether or not it is cut at steps where it would split."""
    pipe, call = policy
    with torch.no_grad():
        expected = rollout(pipe, range(STEPS), LATENT_SEEDS, NOISE_SEEDS, **call)
    found = tree(policy, splits, branching=1, record=range(STEPS))
    assert torch.equal(found.frames, expected.frames)
    assert len(found.segments) == len(splits) + 1
    for ours, theirs in zip(recorded(found), expected.trajectory.steps, strict=True):
        assert (ours.index, ours.step) == (theirs.index, theirs.step)
        for name in ("x", "x_next", "mean"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_without_branches_it_is_the_rollout_in_bf16():
    """The states that one segment hands to the next are those that the pipeline's dtype can hold."""
    pipe, call = FAMILIES["stable_diffusion_3"]()
    pipe.to(torch.bfloat16)
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6)
    call = {**call, "output_type": "latent"}
    with torch.no_grad():
        expected = rollout(pipe, [], LATENT_SEEDS, NOISE_SEEDS, **call)
    assert torch.equal(tree((pipe, call), branching=1).frames, expected.frames)
    branched = recorded(tree((pipe, call)))
    assert all(torch.equal(step.x_next, step.x_next.bfloat16().float()) for step in branched)
    assert all(torch.equal(a.x_next, b.x) for a, b in zip(branched, branched[1:], strict=False))


def test_it_records_a_tree(policy, grown):
    """Children are the rows of the next step; only steps that split have two, around the one mean of their parent."""
    steps = recorded(grown)
    assert [s.index for s in steps] == list(NOISY)
    assert [len(s.x) for s in steps] == [2, 4, 4, 8]
    assert [s.children for s in steps] == [2, 1, 2, 1]
    assert len(grown.frames) == 8
    for step, following in zip(steps, steps[1:], strict=False):
        assert torch.equal(step.x_next, following.x)
    for step in steps:
        assert step.mean.shape == step.x.shape
        for row, x_next in enumerate(step.x_next):
            normal = Normal(step.mean[row // step.children], step.step.std)
            assert float(step.log_prob[row]) == pytest.approx(float(normal.log_prob(x_next).mean()), 1e-4)
    assert grown.segments[1].latent_seeds == (11, 11, 12, 12)
    assert len({round(float(x.sum()), 3) for x in grown.frames}) == 8


def noises(step):
    """(rows K, ...) standardised noise of a recorded step."""
    mean = step.mean.repeat_interleave(step.children, 0)
    return (step.x_next - mean) / step.step.std


def test_a_place_in_a_tree_decides_its_noise(policy, grown):
    """Neither the batch, nor the other trees, nor the tree's place among them; and no two places have the same."""
    swapped, alone = tree(policy, trees=(1, 0), batch=3), tree(policy, trees=(1,), batch=1)
    torch.testing.assert_close(swapped.frames, grown.frames.roll(4, 0), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.frames, grown.frames[4:], rtol=0, atol=1e-5)
    for ours, theirs in zip(recorded(swapped), recorded(grown), strict=True):
        shifted = theirs.x_next.roll(len(theirs.x_next) // 2, 0)
        torch.testing.assert_close(ours.x_next, shifted, rtol=0, atol=1e-5)
    drawn = torch.cat([noises(step).flatten(1)[:, :8] for step in recorded(grown)])
    assert torch.pdist(drawn).min() > 0.1


def test_replay_repeats_a_tree_exactly(policy, grown):
    """Every segment, edges of siblings too, from one row a parent; and some of the rows."""
    pipe, call = policy
    for segment, width in zip(grown.segments, (1, 2, 4), strict=True):
        rows = [tree for tree in (0, 1) for _ in range(width)]
        some = list(range(0, 2 * width, 2))
        for places, limit in ((range(2 * width), 0.0), (some, 1e-6)):
            found = []

            def visit(now, was, found=found):
                found.append((len(now.x), was.children))
                mean, old = (m.repeat_interleave(was.children, 0) for m in (now.mean, was.mean))
                ratio = transitions.log_ratio(was.x_next, mean, old, was.step.std)
                assert ratio.shape == (len(now.x) * was.children,)
                assert ratio.abs().max() <= limit  # noqa: B023

            with torch.no_grad():
                replay(pipe, segment.rows(list(places)), visit, **rows_of(call, [rows[i] for i in places]))
            assert found == [(len(places), step.children) for step in segment.steps]


def test_rows_keep_the_children_of_their_parents(grown):
    """By list and by slice; joining takes them together again."""
    segment = grown.segments[1]
    some = segment.rows([3, 0])
    split = some.steps[-1]
    assert torch.equal(split.x, segment.steps[-1].x[[3, 0]])
    assert torch.equal(split.x_next, segment.steps[-1].x_next[[6, 7, 0, 1]])
    assert torch.equal(segment.rows(slice(1, 3)).steps[-1].x_next, segment.steps[-1].x_next[2:6])
    joined = Trajectory.joined([segment.rows([0, 1]), segment.rows([2, 3])])
    assert all(torch.equal(a.x_next, b.x_next) for a, b in zip(joined.steps, segment.steps, strict=True))


def test_function_evaluations(policy):
    """Splits after 0 and 2 of 5 steps: 2 trees of 1 + 2 + 2 + 4 + 4 rows. A pipeline that takes no initial state runs
    the 2 and the 4 rows that enter a segment once more."""
    pipe, _ = policy
    rows = []
    hook = denoisers(pipe)[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    found = tree(policy)
    hook.remove()
    entering = 0 if found.segments[0].injectable else 2 * (2 + 4)
    guided = 2 if pipe.do_classifier_free_guidance else 1
    assert sum(rows) == guided * (2 * (1 + 2 + 2 + 4 + 4) + entering)


def test_the_pipeline_is_left_as_it_was(policy):
    pipe, _ = policy
    tree(policy)
    assert (pipe.scheduler.on_step, pipe.scheduler.steps, pipe.scheduler.generators) == (None, None, None)
    assert "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_noise_of_siblings(spread):
    """Every child is standard normal; siblings have covariance 1 / (1 + spread^2), cousins none."""
    nodes = [Node(tree, tree, torch.Generator().manual_seed(tree)) for tree in (0, 1)]
    zeros = torch.zeros(2, 200_000)
    step = transitions.Step(0.0, 0.0, 2.0)
    drawn = brancher(nodes, [node.children(3) for node in nodes], spread)(Moment(4, None, step, zeros, zeros)) / 2
    covariance = drawn @ drawn.T / drawn.shape[1]
    siblings = 1 / (1 + spread**2)
    family = torch.full((3, 3), siblings).fill_diagonal_(1.0)
    torch.testing.assert_close(covariance, torch.block_diag(family, family), rtol=0, atol=0.01)


class Toy:
    """A pipeline whose data is N(0, 1) in many dimensions, with the exact velocity."""

    def __init__(self, noise_level):
        stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler = FlowSDEScheduler(stock, "dance", noise_level, grid="uniform")

    def prepare_latents(self, generator):
        return torch.stack([torch.randn(100_000, generator=g) for g in generator])

    def __call__(self, num_inference_steps, generator, output_type):
        x = self.prepare_latents(generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            sigma = t / 1000
            velocity = x * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)  # E[eps - x0 | x]
            x = self.scheduler.step(velocity, t, x).prev_sample
        return (x,)


def test_leaves_have_the_law_of_rollouts():
    """On a Gaussian every step multiplies by f and adds noise, so the leaves' covariances have a closed form: that of
    two leaves is their last common ancestor's variance, and 1/17 of the noise of the split there, carried on.

    f is 1 + (s' - s) (2s - 1 + g^2 / (2s) (2s - 1) (1 - s) + g^2 / (2s) P) / P, P = (1 - s)^2 + s^2, from DanceGRPO's
    mean x + (s' - s) (v + g^2 / (2s) (x + (1 - s) v)); its noise has variance g^2 (s - s').
    """
    num_steps, g, splits = 6, 0.8, (1, 3)
    levels, shared = uniform(num_steps, 3.0), torch.ones(4, 4, dtype=torch.float64)
    covariance = torch.ones(1, 1, dtype=torch.float64)
    for i, (now, after) in enumerate(zip(levels, levels[1:], strict=False)):
        slope = (2 * now - 1) / ((1 - now) ** 2 + now**2)
        factor = 1 + (after - now) * (slope + g**2 / (2 * now) * (1 + (1 - now) * slope))
        variance = g**2 * (now - after) if i < num_steps - 1 else 0.0
        factor = factor if variance else 1 + (after - now) * slope
        covariance = factor**2 * covariance
        added = torch.eye(len(covariance), dtype=torch.float64) * variance
        if i in splits:
            block = torch.full((2, 2), variance / 17, dtype=torch.float64).fill_diagonal_(variance)
            covariance = covariance.repeat_interleave(2, 0).repeat_interleave(2, 1)
            added = torch.block_diag(*[block] * (len(covariance) // 2))
        covariance = covariance + added
    pipe = Toy(g)
    found = grow(
        lambda rows, **options: rollout(pipe, [], num_inference_steps=num_steps, **{"output_type": "pt", **options}),
        num_steps, splits, 2, SPREAD, [1], [2],
    ).frames.double()  # fmt: skip
    assert covariance.shape == shared.shape
    torch.testing.assert_close(found @ found.T / found.shape[1], covariance, rtol=0, atol=0.02)
    sequential = rollout(pipe, [], [1], [2], num_inference_steps=num_steps, output_type="pt").frames
    assert float(sequential.var()) == pytest.approx(float(covariance[0, 0]), abs=0.02)
    assert covariance[0, 1] > covariance[0, 2] + 0.05  # siblings have more in common than cousins


def test_what_cannot_be_grown_is_refused(policy):
    assert segment_steps(20, (0, 3, 6, 9)) == [range(1), range(1, 4), range(4, 7), range(7, 10), range(10, 20)]
    assert segment_steps(4, ()) == [range(4)]
    for splits in [(3, 1), (1, 1), (4,), (7,), (-1,)]:
        with pytest.raises(ValueError, match="have to ascend"):
            segment_steps(5, splits)
    pipe, _ = policy
    pipe.scheduler.stochastic = (0, 1)
    try:
        with pytest.raises(ValueError, match="step 2 adds no noise"):
            tree(policy)
    finally:
        pipe.scheduler.stochastic = None
    assert not math.isnan(float(tree(policy).frames.sum()))
