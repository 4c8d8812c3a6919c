"""Hybrid inference: the trained weights take the first share of the steps, the reference the rest."""

import copy
import json

import pytest
import torch

from alignment.config import load_recipe
from alignment.distributed import Processes
from alignment.policy import as_videos
from alignment.run import prepare
from samplers.rollout import generators, patched
from tests.alignment.tiny import make_policy, shake
from tests.pipelines import FAMILIES, PROMPTS, STEPS

SEEDS = [5, 6]


def chain(policy, **options):
    """The states after every step of the pipeline's own scheduler, and the video."""
    states = []

    def watch(step):
        def watched(*args, **kwargs):
            result = step(*args, **kwargs)
            states.append(result[0].clone())
            return result

        return watched

    with patched(type(policy.stock), "step", watch):
        video = policy.generate(PROMPTS, SEEDS, **options)
    return states, video


def moved(family, **options):
    policy = make_policy(family, **options)
    policy.keep_reference()
    shake(policy)
    return policy


@pytest.mark.parametrize("family", ["wan", "wan_two_experts", "mochi", "cogvideox", "stable_diffusion"])
def test_who_takes_which_steps(family):
    """Half of 5 steps is 3: the first two states are those of the trained weights, and so is the third, whose step
    ends before the hand-over; from there on the reference goes its own way."""
    policy = moved(family)
    trained, plain = chain(policy)
    with policy.reference():
        _, base = chain(policy)
    assert torch.equal(policy.generate(PROMPTS, SEEDS, trained_share=1.0), plain)
    assert torch.equal(policy.generate(PROMPTS, SEEDS, trained_share=0.0), base)
    half, video = chain(policy, trained_share=0.5)
    assert len(half) == len(trained) == STEPS
    assert [torch.equal(a, b) for a, b in zip(half, trained, strict=True)] == [True, True, True, False, False]
    assert not torch.equal(video, plain)
    assert not torch.equal(video, base)
    assert torch.equal(policy.generate(PROMPTS, SEEDS), plain)  # nothing stays switched off


def test_the_reference_goes_on_from_where_the_trained_weights_stopped():
    """The base alone, put in the state of the hand-over, ends alike; Mochi's Euler keeps nothing of earlier steps."""
    policy, taken = moved("mochi"), []
    states, video = chain(policy, trained_share=0.6)

    def put(step):
        def stepped(*args, **kwargs):
            result = step(*args, **kwargs)
            taken.append(states[len(taken)] if len(taken) < 3 else result[0])
            return (taken[-1],)

        return stepped

    with policy.reference(), patched(type(policy.stock), "step", put):
        assert torch.equal(policy.generate(PROMPTS, SEEDS), video)


def test_a_copy_of_the_scheduler_is_not_counted():
    """Pipelines with a second modality step a copy beside it."""
    policy, copies = moved("wan"), []

    def step_a_copy(pipe, step, timestep, tensors):
        copies.append(copies[-1] if copies else copy.deepcopy(pipe.scheduler))
        if step < STEPS - 1:  # it was made behind the first step
            copies[-1].step(tensors["latents"], timestep, tensors["latents"])
        return tensors

    plain = policy.generate(PROMPTS, SEEDS, trained_share=0.8)
    assert torch.equal(policy.generate(PROMPTS, SEEDS, trained_share=0.8, callback_on_step_end=step_a_copy), plain)
    assert len(copies) == STEPS


@pytest.mark.parametrize(("share", "trained"), [(0.2, 1), (0.25, 2), (0.56, 3), (0.6, 3), (0.99, 5)])
def test_the_share_is_rounded_up(share, trained):
    policy = moved("wan")
    states, (other, _) = chain(policy)[0], chain(policy, trained_share=share)
    assert sum(torch.equal(a, b) for a, b in zip(states, other, strict=True)) == trained


def test_full_fine_tuning_needs_its_copy():
    policy = make_policy(model={"trained": "full"})
    shake(policy, 0.02)
    with pytest.raises(RuntimeError, match="keep_reference"):
        policy.generate(PROMPTS, SEEDS, trained_share=0.5)
    policy.keep_reference()
    trained, plain = chain(policy)
    shake(policy, 0.02, seed=1)
    half, _ = chain(policy, trained_share=0.5)
    assert not torch.equal(half[0], trained[0])
    with policy.reference():
        assert torch.equal(policy.generate(PROMPTS, SEEDS), plain)
    assert torch.equal(policy.generate(PROMPTS, SEEDS, trained_share=0.0), plain)


def test_plain_diffusers_does_the_same_in_a_callback(tmp_path):
    """What a user of the saved adapters writes; the third of five steps is the last one with them."""
    policy = moved("wan")
    pipe, call = FAMILIES["wan"]()
    pipe.load_lora_weights(policy.save(tmp_path))

    def hand_over(pipe, step, timestep, tensors):
        if step == 2:
            pipe.disable_lora()
        return tensors

    with torch.no_grad():
        video = as_videos(pipe(**call, generator=generators(SEEDS), callback_on_step_end=hand_over)[0])
    torch.testing.assert_close(video, policy.generate(PROMPTS, SEEDS, trained_share=0.6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_evaluation_hands_over(write, trained):
    """Whatever the weights, with share 0 every evaluation is that of the base."""
    options = [f"model.trained={trained}", "evaluation.trained_share=0"]
    loaded = load_recipe(write(), options)
    loaded.folder.mkdir(exist_ok=True)
    run = prepare(loaded, Processes(cpu=True))
    readings = []
    for iteration in range(2):
        run.evaluate(iteration)
        text = (run.folder / "samples" / f"{iteration:06d}" / "scores.json").read_text()
        readings.append(json.loads(text)["values"]["reward/bright"])
        shake(run.policy, 0.5)
    assert readings[0] == readings[1]
    loaded.evaluation.trained_share = 1.0
    run.evaluate(2)
    text = (run.folder / "samples" / "000002" / "scores.json").read_text()
    assert json.loads(text)["values"]["reward/bright"] != readings[0]
