"""LoRA through diffusers' own add_adapter, with and without gradient checkpointing, in a replay."""

import peft
import pytest
import torch

from samplers import replay, rollout, sde_scheduler, transitions
from tests.pipelines import FAMILIES


@pytest.fixture(scope="module", params=["wan", "hunyuan_video", "cogvideox"])
def adapted(request):
    pipe, call = FAMILIES[request.param]()
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipe.transformer.add_adapter(lora)
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6)
    with torch.no_grad():
        trajectory = rollout(pipe, [0, 2], [1, 2], [3, 4], **{**call, "output_type": "latent"}).trajectory
    return pipe, call, trajectory


def gradients(pipe, call, trajectory) -> tuple[dict[str, torch.Tensor], int]:
    """(name -> gradient of the log-probs, how many tensors the graphs kept for it)."""
    pipe.transformer.zero_grad()
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += 1
        return tensor

    def visit(now, was):
        assert transitions.log_ratio(was.x_next, now.mean, was.mean, was.step.std).abs().max() == 0
        transitions.log_prob(was.x_next, now.mean, was.step.std).sum().backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        replay(pipe, trajectory, visit, **call)
    trained = {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    return {name: p.grad.clone() for name, p in trained.items()}, kept


def test_gradient_checkpointing_changes_nothing_but_memory(adapted):
    pipe, call, trajectory = adapted
    plain, kept = gradients(pipe, call, trajectory)
    assert plain
    assert all("lora" in name and gradient.abs().max() > 0 for name, gradient in plain.items())
    pipe.transformer.enable_gradient_checkpointing()
    try:
        checkpointed, kept_then = gradients(pipe, call, trajectory)
    finally:
        pipe.transformer.disable_gradient_checkpointing()
    assert kept_then < kept
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


def test_adapter_off_is_the_reference(adapted):
    """With the adapter off the mean moves, and comes back bit for bit with it on."""
    pipe, call, trajectory = adapted
    pipe.transformer.disable_adapters()
    moved = []
    with torch.no_grad():
        replay(pipe, trajectory, lambda now, was: moved.append(float((now.mean - was.mean).abs().max())), **call)
        pipe.transformer.enable_adapters()
        back = []
        replay(pipe, trajectory, lambda now, was: back.append(float((now.mean - was.mean).abs().max())), **call)
    assert min(moved) > 1e-6
    assert max(back) == 0
