"""What is asked for runs, and nothing else: no hidden autocast, no work for what is frozen or known already."""

import gc

import pytest
import torch

from alignment.algorithms import grpo
from samplers.transitions import log_prob
from tests.alignment.tiny import grpo_run, make_policy, make_run, shake
from tests.pipelines import PROMPTS

SEEDS = [0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_only_where_the_recipe_lowers_the_dtype(dtype: str) -> None:
    policy = make_policy(model={"dtype": dtype})
    seen = set()
    policy.pipe.transformer.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    trajectory = policy.rollout(PROMPTS, SEEDS, SEEDS, [1]).trajectory
    policy.replay(trajectory, PROMPTS, lambda now, was: None)
    policy.generate(PROMPTS, SEEDS)
    assert seen == {dtype == "bfloat16"}


def test_an_update_runs_the_denoiser_alone(tmp_path) -> None:
    """The prompts are embedded and the videos decoded already; frozen weights get no gradient."""
    policy = make_policy()
    policy.cache_embeddings(tmp_path)
    shake(policy)
    trajectory = policy.rollout(PROMPTS, SEEDS, SEEDS, [1, 3]).trajectory
    ran = []
    for name in ("text_encoder", "vae"):
        part = getattr(policy.pipe, name)
        part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for module in part.modules():
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))

    def visit(now, was) -> None:
        log_prob(was.x_next, now.mean, was.step.std).sum().backward()

    policy.replay(trajectory, PROMPTS, visit)
    assert ran == []
    trained = set(map(id, policy.parameters.values()))
    for part in policy.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                assert p.requires_grad == (id(p) in trained)
                assert (p.grad is not None) == (id(p) in trained)
    policy.generate(PROMPTS, SEEDS)
    assert set(ran) == {"vae"}  # the hooks do see work where there is some


@pytest.mark.parametrize("family", ["wan", "stable_diffusion_3"])
def test_a_float32_vae_decodes_in_float32(family: str) -> None:
    """Under bfloat16 autocast too: the same latents give the very video that the VAE gives alone."""
    policy = make_policy(family, model={"dtype": "bfloat16"})
    policy.pipe.vae.float()
    kept = {}

    def keep(module, args, output) -> None:
        kept["dtype"] = output.dtype
        kept["autocast"] = torch.is_autocast_enabled("cpu")

    last = next(
        m for m in reversed(list(policy.pipe.vae.decoder.modules())) if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)
    )
    last.register_forward_hook(keep)
    policy.generate(PROMPTS, SEEDS)
    assert kept == {"dtype": torch.float32, "autocast": False}


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_drift_is_the_relative_change_of_the_weights(trained: str, tmp_path) -> None:
    """Every weight times 1.5 is a change of half the norm, whichever entries are looked at."""
    run = make_run(tmp_path, make_policy(model={"trained": trained}))
    assert run._drift() == 0
    with torch.no_grad():
        for p in run.policy.parameters.values():
            p.mul_(1.5)
    assert run._drift() == pytest.approx(0.5)


def test_nothing_of_an_iteration_outlives_it(tmp_path, monkeypatch) -> None:
    """Tensors that a finished iteration leaves behind would fill the memory of a long run."""
    run, alive = grpo_run(tmp_path), []
    run.recipe.iterations = 4
    finish = run._finish

    def count() -> None:
        finish()
        gc.collect()
        alive.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)))

    monkeypatch.setattr(run, "_finish", count)
    run.open()
    grpo.train(run)
    assert alive[1] == alive[2] == alive[3]
