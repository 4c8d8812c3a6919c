"""The start-up check: it lets every family pass, and refuses loops that a replay cannot repeat."""

import pytest
import torch

from alignment.errors import UserError
from alignment.self_check import self_check, takes_levels_each
from tests.alignment.tiny import make_policy
from tests.pipelines import FAMILIES, PROMPTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family, dtype):
    policy = make_policy(family, model={"dtype": dtype}, sampler={"window": [1, 3]})
    self_check(policy, PROMPTS[0])
    assert policy.scheduler.stochastic == (1, 2)
    assert all(p.grad is None for p in policy.parameters.values())
    assert policy.injectable == (family != "ltx_image_to_video")


LEVELS_EACH = ["wan", "wan_image_to_video", "skyreels_v2", "hunyuan_video", "flux"]  # whatever the guidance
WITHOUT_GUIDANCE = ["sana_video", "ltx", "ltx_image_to_video", "mochi", "stable_diffusion_3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*LEVELS_EACH, *WITHOUT_GUIDANCE, "wan_two_experts"])
def test_which_families_take_a_level_for_each_sample(family, dtype):
    policy = make_policy(family, model={"dtype": dtype})
    self_check(policy, PROMPTS[0])
    assert takes_levels_each(policy, PROMPTS[0]) == (family in LEVELS_EACH)
    assert takes_levels_each(policy, PROMPTS[0], guidance_scale=1.0) == (family != "wan_two_experts")


def test_a_level_that_is_not_the_samples_own_is_found():
    """The network takes the first timestep for all: nothing raises, and the second sample's velocity is wrong."""
    policy = make_policy()

    def first_for_all(module, args, kwargs):
        return args, {**kwargs, "timestep": kwargs["timestep"][:1].expand(len(kwargs["timestep"]))}

    assert takes_levels_each(policy, PROMPTS[0])
    policy.pipe.transformer.register_forward_pre_hook(first_for_all, with_kwargs=True)
    assert not takes_levels_each(policy, PROMPTS[0])


def test_a_rollout_without_noise_passes():
    policy = make_policy(sampler={"kernel": "ode"})
    self_check(policy, PROMPTS[0])
    policy.pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] + torch.rand(()),))
    assert "does not repeat its rollout" in refused(policy)


def refused(policy) -> str:
    """The one line that the check answers with."""
    before = policy.scheduler.stochastic
    with pytest.raises(UserError) as error:
        self_check(policy, PROMPTS[0])
    assert policy.scheduler.stochastic == before
    assert policy.pipe.scheduler is policy.stock
    assert "\n" not in str(error.value)
    return str(error.value)


def test_state_that_changes_between_steps_is_refused():
    """The loop shrinks the latents after every step, out of the scheduler's sight."""
    policy = make_policy()

    class Drifting(type(policy.pipe)):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            step = self.scheduler.step
            self.scheduler.step = lambda *a, **k: tuple(0.99 * part for part in step(*a, **k))
            try:
                return super().__call__.__wrapped__(self, *args, **kwargs)
            finally:
                del self.scheduler.step

    policy.pipe.__class__ = Drifting
    assert "a replay of Drifting does not repeat its rollout" in refused(policy)


def test_output_of_an_earlier_step_is_refused():
    """A step cache: what the network gives depends on what it gave before."""
    policy = make_policy()
    kept = []

    def reuse(module, args, output):
        kept.append(output[0].detach())
        return (output[0] + 0.1 * kept[-3] if len(kept) > 2 else output[0],)

    policy.pipe.transformer.register_forward_hook(reuse)
    assert "keeps a state that the scheduler does not see" in refused(policy)


def test_not_a_number_is_refused():
    policy = make_policy()
    policy.pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * float("nan"),))
    assert "does not repeat its rollout" in refused(policy)


def test_loop_that_leaves_steps_out_is_refused():
    policy = make_policy()

    class Skipping(type(policy.pipe)):
        @property
        def interrupt(self):
            return self.scheduler.step_index == 1

    policy.pipe.__class__ = Skipping
    assert "Skipping does not call its scheduler once a step" in refused(policy)


def test_gradient_that_does_not_arrive_is_refused():
    policy = make_policy()
    policy.pipe.transformer.register_forward_hook(
        lambda module, args, output: (output[0].detach() + 0 * output[0].detach().requires_grad_(),)
    )
    assert "no gradient reaches the trained weights" in refused(policy)


def test_exception_inside_leaves_everything_as_it_was():
    policy = make_policy(sampler={"window": [0, 2]})
    hook = policy.pipe.transformer.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("on purpose")))
    with pytest.raises(OSError, match="on purpose"):
        self_check(policy, PROMPTS[0])
    assert policy.scheduler.stochastic == (0, 1)
    assert policy.scheduler.on_step is None
    hook.remove()
    self_check(policy, PROMPTS[0])
