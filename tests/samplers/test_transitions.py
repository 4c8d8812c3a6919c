"""The algebra of the transition kernels: means, log-probabilities, ratios and gradients of a single step."""

import math

import diffusers
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from samplers import transitions as tr
from samplers.transitions import Grid

from .grids import GRIDS, constants, old_unipc, uniform

STOCHASTIC = {"dance": 0.3, "flow": 0.7, "wan_linear": 1.0, "sage": 0.7, "cps": 0.8, "ddim": 0.9}
EULER_FAMILY = ["dance", "flow", "wan_linear", "sage"]
LEVELS = uniform(20, 3.0)
PAIRS = [(1.0, LEVELS[1]), (LEVELS[1], LEVELS[2]), (0.7, 0.6), (LEVELS[-2], 0.0)]


def at(kernel: str, sigma: float, sigma_next: float, noise_level: float | None = None) -> tr.Transition:
    level = STOCHASTIC.get(kernel, 0.0) if noise_level is None else noise_level
    return tr.transition(kernel, sigma, sigma_next, level, constants(LEVELS))


def tensors(*shape: int, count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def diffusion(kernel: str, sigma: float, sigma_next: float) -> float:
    """g^2 as the papers give it; for sage its mean over the step, by quadrature of s / (1 - s) away from s = 1."""
    level, second = STOCHASTIC[kernel], LEVELS[1]
    if kernel == "dance":
        return level**2
    if kernel == "flow":
        return level**2 * sigma / (1 - (second if sigma == 1 else sigma))
    if kernel == "wan_linear":
        return (level * second * sigma) ** 2
    s = np.linspace(sigma_next, sigma, 200_001)
    return level**2 * float(np.trapezoid(s / (1 - s), s)) / (sigma - sigma_next)


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
@pytest.mark.parametrize("kernel", ["ode", *STOCHASTIC])
def test_without_noise_every_kernel_is_the_euler_step(kernel, sigma, sigma_next):
    """(1 - s') (x - s v) + s' (x + (1 - s) v) = x - (s - s') v."""
    x, v = tensors(2, 3, 4)
    if kernel == "sage" and sigma == 1:
        sigma = 0.99
    step = tr.compose(at(kernel, sigma, sigma_next, 0.0), tr.flow_prediction(sigma))
    assert step.std == 0
    torch.testing.assert_close(tr.mean(step, x, v), x - (sigma - sigma_next) * v, atol=1e-12, rtol=0)


def test_the_score_has_two_equal_forms():
    """-eps_hat / s = -(x - (1 - s) x0_hat) / s^2, with the predictions that the kernels are built on."""
    x, v = tensors(2, 5)
    p = tr.flow_prediction(0.37)
    clean, noise = p.x0_x * x + p.x0_o * v, p.eps_x * x + p.eps_o * v
    torch.testing.assert_close(noise / 0.37, (x - (1 - 0.37) * clean) / 0.37**2, atol=1e-13, rtol=0)
    torch.testing.assert_close(noise - clean, v, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
@pytest.mark.parametrize("kernel", EULER_FAMILY)
def test_euler_family_mean_as_the_papers_write_it(kernel, sigma, sigma_next):
    """mu = x (1 + g^2 dt / 2s) + v (1 + g^2 (1 - s) / 2s) dt and std = g sqrt(-dt), dt = s' - s."""
    if kernel == "sage" and sigma == 1:  # its g has a pole there; the clamp is tested below
        sigma = 0.99
    x, v = tensors(2, 3, 4)
    g2, dt = diffusion(kernel, sigma, sigma_next), sigma_next - sigma
    step = tr.compose(at(kernel, sigma, sigma_next), tr.flow_prediction(sigma))
    expected = x * (1 + g2 * dt / (2 * sigma)) + v * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(tr.mean(step, x, v), expected, atol=1e-7, rtol=0)
    assert step.std == pytest.approx(math.sqrt(-g2 * dt), rel=1e-6)


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS)
@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_noise_of_a_point_mass(kernel, sigma, sigma_next):
    """With all data in one point x0_hat is exact and eps_hat is the true noise, so the noise at s' has variance
    ce^2 + std^2: s'^2 for cps and ddim, s'^2 + g^2 D^2 / s + g^4 D^2 / 4s^2 (D = s - s') for the Euler family."""
    if kernel == "sage" and sigma == 1:
        sigma = 0.99
    t = at(kernel, sigma, sigma_next)
    excess = 0.0
    if kernel in EULER_FAMILY:
        g2, delta = diffusion(kernel, sigma, sigma_next), sigma - sigma_next
        excess = g2 * delta**2 / sigma + g2**2 * delta**2 / (4 * sigma**2)
    assert t.c0 == 1 - sigma_next
    assert t.ce**2 + t.std**2 == pytest.approx(sigma_next**2 + excess, rel=1e-6, abs=1e-14)


def test_std_of_cps_and_ddim():
    """cps: s' sin(eta pi / 2). ddim (eq. 16): eta sqrt((1 - a')/(1 - a)) sqrt(1 - a/a') in a = alpha_bar, where
    b'/b sqrt(1 - a/a') of the variance-preserving path is divided by its scale a' + b' on the flow path."""
    sigma, sigma_next = 0.7, 0.6
    assert at("cps", sigma, sigma_next).std == pytest.approx(0.6 * math.sin(0.8 * math.pi / 2), rel=1e-12)
    bar, bar_next = ((1 - s) ** 2 / ((1 - s) ** 2 + s**2) for s in (sigma, sigma_next))
    eq16 = 0.9 * math.sqrt((1 - bar_next) / (1 - bar)) * math.sqrt(1 - bar / bar_next)
    scale = math.sqrt(bar_next) + math.sqrt(1 - bar_next)
    assert at("ddim", sigma, sigma_next).std == pytest.approx(eq16 / scale, rel=1e-12)


@pytest.mark.parametrize("shift", [1, 3, 5, 8, 17])
@pytest.mark.parametrize("grid", GRIDS)
def test_std_is_finite_and_bounded_on_every_grid(grid, shift):
    """Flow's first std is at most its a on every grid; cps and ddim add at most the noise that is due, s'."""
    for steps in [2, 3, 7, 20, 100, 1000]:
        levels = GRIDS[grid](steps, shift)
        for kernel in STOCHASTIC:
            level = STOCHASTIC[kernel]
            pairs = list(zip(levels, levels[1:], strict=False))
            pairs = [p for p in pairs if kernel != "sage" or 1 - p[1] > 3.02e-3]
            all_t = [tr.transition(kernel, s, n, level, constants(levels)) for s, n in pairs]
            assert all(math.isfinite(value) for t in all_t for value in t), (kernel, steps)
            if kernel == "flow":
                assert all_t[0].std <= level * (1 + 1e-9)
            if kernel in ("cps", "ddim"):
                assert all(t.std <= n + 1e-15 and t.ce >= 0 for t, (_, n) in zip(all_t, pairs, strict=True))


@pytest.mark.parametrize(("grid", "expected"), [("uniform", 0.7), ("old_unipc", 0.6932), ("new_unipc", 0.69998)])
def test_flow_takes_no_explosive_first_step(grid, expected):
    """A guard for s == 1 alone gives std 5.03 and 92 on UniPC's grids: a sqrt(s0 / (1 - s0)) sqrt(s0 - s1)."""
    levels = GRIDS[grid](20, 3.0)
    assert tr.transition("flow", *levels[:2], 0.7, constants(levels)).std == pytest.approx(expected, abs=1e-4)


def test_sliced_grid_needs_the_constants_of_the_whole_one():
    """flow's hold and wan_linear's slope are sigma_1 of the rollout, not of the slice that a replay runs."""
    sigma, sigma_next, later = LEVELS[3], LEVELS[4], Grid(LEVELS[4], 0.0)
    assert at("wan_linear", sigma, sigma_next) != tr.transition("wan_linear", sigma, sigma_next, 1.0, later)
    assert at("flow", sigma, sigma_next) != tr.transition("flow", sigma, sigma_next, 0.7, later)


@pytest.mark.parametrize(("shift", "steps"), [(3, 112), (5, 68), (8, 43)])
def test_sage_refuses_steps_inside_its_clamp(shift, steps):
    """From s = 1 held at 1 - c the variance is log(d / c) - d with d = 1 - s_1; d = 1 / (k T - k + 1) at shift k."""
    levels = uniform(steps, shift)
    with pytest.raises(ValueError, match="no positive variance"):
        tr.transition("sage", *levels[:2], 0.7, constants(levels))
    levels = uniform(steps - 1, shift)
    assert tr.transition("sage", *levels[:2], 0.7, constants(levels)).std > 0


def test_refusals():
    grid = constants(LEVELS)
    for bad in [("flow", 0.5, 0.5, 0.7), ("flow", 1.1, 0.5, 0.7), ("cps", 0.6, 0.5, 1.1), ("dance", 0.6, 0.5, -0.1)]:
        with pytest.raises(ValueError, match="needs 1 >= sigma|out of range"):
            tr.transition(*bad, grid)
    with pytest.raises(ValueError, match="known: ode, dance"):
        tr.transition("unknown", 0.6, 0.5, 0.7, grid)
    x, mean = tensors(2, 3)
    for function, arguments in [(tr.log_prob, (x, mean)), (tr.log_ratio, (x, mean, mean))]:
        with pytest.raises(ValueError, match="deterministic"):
            function(*arguments, 0.0)


def test_flash_weights():
    """GRPO's per-step weight 1 / c on Wan's own grid, T = 20, shift 3: the ten numbers published start at 7.4770 for
    t = 999 and end at 3.7754 for t = 785. c = sqrt(D)/g + g sqrt(D) (1 - s) / 2s."""
    levels = old_unipc(20, 3.0)
    found = {}
    for sigma, sigma_next in zip(levels[:10], levels[1:11], strict=True):
        t = tr.transition("wan_linear", sigma, sigma_next, 1.0, constants(levels))
        c = tr.compose(t, tr.flow_prediction(sigma)).gradient_coefficient
        g, delta = levels[1] * sigma, sigma - sigma_next
        assert c == pytest.approx(math.sqrt(delta) / g + g * math.sqrt(delta) * (1 - sigma) / (2 * sigma), rel=1e-10)
        found[int(1000 * sigma)] = 1 / c
    assert list(found) == [999, 982, 963, 944, 922, 899, 874, 847, 817, 785]
    assert found[999] == pytest.approx(7.4770, rel=1e-5)
    assert found[785] == pytest.approx(3.7754, rel=1e-5)


def test_log_prob_is_that_of_torch_distributions():
    x_next, mean = tensors(3, 4, 5)
    expected = Normal(mean, 0.3).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(tr.log_prob(x_next, mean, 0.3), expected, atol=1e-12, rtol=0)


def test_kl_is_that_of_torch_distributions():
    mean, reference = tensors(3, 4, 5)
    expected = kl_divergence(Normal(mean, 0.3), Normal(reference, 0.3)).flatten(1).mean(1)
    torch.testing.assert_close(tr.kl_divergence(mean, reference, 0.3), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_gradient_is_minus_c_noise(kernel):
    """d/dv of -|x' - mu|^2 / 2 std^2 is (dmu/dv) noise / std, and dmu/dv = -(c0 s - ce (1 - s))."""
    sigma, sigma_next = 0.7, 0.6
    t = at(kernel, sigma, sigma_next)
    step = tr.compose(t, tr.flow_prediction(sigma))
    x, v, noise = tensors(2, 3, 4, count=3)
    v.requires_grad_()
    mean = tr.mean(step, x, v)
    x_next = mean + step.std * noise  # keeps its graph: log_prob has to cut it
    (gradient,) = torch.autograd.grad(tr.log_prob(x_next, mean, step.std).sum(), v)
    c = (t.c0 * sigma - t.ce * (1 - sigma)) / t.std
    assert step.gradient_coefficient == pytest.approx(c, rel=1e-12)
    torch.testing.assert_close(gradient, -c * noise / 12, atol=1e-13, rtol=0)


def test_mean_gradient_over_noises_is_zero():
    """E[grad log p] = 0; the standard error of the mean over N noises is c / sqrt(N) an element. And an action that is
    the mean teaches nothing."""
    step = tr.compose(at("flow", 0.7, 0.6), tr.flow_prediction(0.7))
    x, v, noise = (
        t.expand(40_000, 2) if i < 2 else t for i, t in enumerate(tensors(1, 2) + tensors(40_000, 2, count=1))
    )
    v = v.clone().requires_grad_()
    mean = tr.mean(step, x, v)
    (gradient,) = torch.autograd.grad(
        2 * tr.log_prob(mean + step.std * noise, mean, step.std).sum(), v, retain_graph=True
    )
    c = step.gradient_coefficient
    assert gradient.mean(0).abs().max() < 4 * c / 200
    assert gradient.std(0).mean().item() == pytest.approx(c, rel=0.02)
    (gradient,) = torch.autograd.grad(tr.log_prob(mean, mean, step.std).sum(), v)
    assert gradient.abs().max() == 0


def test_log_ratio_is_the_difference_of_log_probs():
    x_next, mean, old = tensors(3, 4, 5, count=3)
    expected = tr.log_prob(x_next, mean, 0.3) - tr.log_prob(x_next, old, 0.3)
    torch.testing.assert_close(tr.log_ratio(x_next, mean, old, 0.3), expected, atol=1e-12, rtol=0)
    assert tr.log_ratio(x_next, old, old, 0.3).abs().max() == 0


def test_log_ratio_keeps_what_float32_subtraction_loses():
    """At video size two float32 log-probs near -0.4 are 3e-8 apart at best; the ratio here is about 1e-6."""
    old, direction, noise = (t.float() for t in tensors(1, 1_000_000, count=3))
    mean, std = old + 2e-4 * direction, 0.2
    x_next = old + std * noise
    exact = tr.log_ratio(*(t.double() for t in (x_next, mean, old)), std)
    naive = tr.log_prob(x_next, mean, std) - tr.log_prob(x_next, old, std)
    direct = tr.log_ratio(x_next, mean, old, std)
    assert direct.dtype == torch.float64
    assert abs(direct / exact - 1) < 1e-4
    assert abs(naive / exact - 1) > 1e-3


def test_gradient_of_the_log_ratio_reaches_the_new_mean_only():
    """At ratio 1 the gradient of the log-ratio is that of the log-prob (REINFORCE)."""
    x_next, old = tensors(2, 6)
    mean, old = old.clone().requires_grad_(), old.clone().requires_grad_()
    tr.log_ratio(x_next, mean, old, 0.3).sum().backward()
    (expected,) = torch.autograd.grad(tr.log_prob(x_next, mean, 0.3).sum(), mean)
    torch.testing.assert_close(mean.grad, expected, atol=1e-12, rtol=0)
    assert old.grad is None


def test_normalised_log_ratio_takes_the_bias_out_of_the_log_ratio():
    """std (log ratio + mean(dmu^2) / 2 std^2), and exactly 0 where the mean repeats."""
    x_next, mean, old = tensors(3, 4, 5, count=3)
    bias = (mean - old).square().mean((1, 2)) / (2 * 0.3**2)
    found = tr.normalised_log_ratio(x_next, mean, old, 0.3)
    torch.testing.assert_close(found, 0.3 * (tr.log_ratio(x_next, mean, old, 0.3) + bias), atol=1e-12, rtol=0)
    assert found.dtype == torch.float64
    assert tr.normalised_log_ratio(x_next, old, old, 0.3).abs().max() == 0
    with pytest.raises(ValueError, match="no log-ratio"):
        tr.normalised_log_ratio(x_next, mean, old, 0.0)


def test_normalised_log_ratio_has_mean_zero_over_the_noise():
    """Its deviation over the noise is rms(dmu) / sqrt(D); the log-ratio's mean is -mean(dmu^2) / 2 std^2."""
    noise, old, mean = tensors(20_000, 4, count=1) + tensors(1, 4, count=2, seed=5)
    std, error = 0.3, (mean - old).square().mean().sqrt().item() / 2 / math.sqrt(20_000)
    given = old + std * noise, mean.expand(20_000, 4), old.expand(20_000, 4), std
    assert abs(tr.normalised_log_ratio(*given).mean()) < 4 * error
    assert tr.normalised_log_ratio(*given).std().item() == pytest.approx(error * math.sqrt(20_000), rel=0.03)
    assert abs(tr.log_ratio(*given).mean() + (mean - old).square().mean() / (2 * std**2)) < 4 * error / std


def test_gradient_of_the_normalised_log_ratio_is_the_noise():
    """noise / D, however far the mean has moved: a detached bias would add -dmu / (std D)."""
    old, mean, noise = tensors(2, 3, 4, count=3)
    x_next, mean, old = old + 0.3 * noise, mean.clone().requires_grad_(), old.clone().requires_grad_()
    tr.normalised_log_ratio(x_next, mean, old, 0.3).sum().backward()
    torch.testing.assert_close(mean.grad, noise / 12, atol=1e-13, rtol=0)
    assert old.grad is None


def test_normalised_log_ratio_keeps_what_float32_subtraction_loses():
    old, direction, noise = (t.float() for t in tensors(1, 1_000_000, count=3))
    mean, std = old + 2e-4 * direction, 0.2
    x_next = old + std * noise
    exact = tr.normalised_log_ratio(*(t.double() for t in (x_next, mean, old)), std)
    bias = (mean - old).square().flatten(1).mean(1) / (2 * std**2)
    naive = std * (tr.log_prob(x_next, mean, std) - tr.log_prob(x_next, old, std) + bias)
    direct = tr.normalised_log_ratio(x_next, mean, old, std)
    assert direct.dtype == torch.float64
    assert abs(direct / exact - 1) < 1e-3
    assert abs(naive / exact - 1) > 1e-2


@pytest.mark.parametrize(("sigma", "sigma_next"), PAIRS[:3])
@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_balanced_gradients_are_equally_large_at_every_step(kernel, sigma, sigma_next):
    """The gradient at the network's output is -noise / D; for the Euler family the balance is GRPO-Guard's division by
    dt, up to 1 + g^2 (1 - s) / 2s."""
    if kernel == "sage" and sigma == 1:
        sigma = 0.99
    step = tr.compose(at(kernel, sigma, sigma_next), tr.flow_prediction(sigma))
    x, v, old, noise = tensors(2, 3, 4, count=4)
    v.requires_grad_()
    old_mean = tr.mean(step, x, old)
    loss = step.gradient_balance * tr.normalised_log_ratio(
        old_mean + step.std * noise, tr.mean(step, x, v), old_mean, step.std
    )
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    torch.testing.assert_close(gradient, -noise / 12, atol=1e-12, rtol=0)
    assert step.gradient_balance == pytest.approx(1 / (step.gradient_coefficient * step.std), rel=1e-12)
    if kernel in EULER_FAMILY:
        scale = (sigma - sigma_next) * (1 + diffusion(kernel, sigma, sigma_next) * (1 - sigma) / (2 * sigma))
        assert step.gradient_balance == pytest.approx(1 / scale, rel=1e-6)


def test_the_step_size_alone_balances_no_coefficient_preserving_kernel():
    """c std / dt over Wan's steps but the last, T = 20, shift 3."""
    levels = old_unipc(20, 3.0)
    for kernel, level, most in (
        ("dance", 0.3, 1.14),
        ("wan_linear", 1.0, 1.12),
        ("flow", 0.7, 1.245),
        ("cps", 0.8, 4.11),
    ):
        ratios = []
        for sigma, sigma_next in zip(levels[:-2], levels[1:-1], strict=True):
            t = tr.transition(kernel, sigma, sigma_next, level, constants(levels))
            balance = tr.compose(t, tr.flow_prediction(sigma)).gradient_balance
            ratios.append(1 / (balance * (sigma - sigma_next)))
        assert 1 <= min(ratios) < 1.02
        assert max(ratios) == pytest.approx(most, abs=0.006)


def test_balance_keeps_the_sign_of_networks_that_predict_the_clean_sample():
    """There more output means a larger mean: c is negative, the balance is not."""
    step = tr.compose(tr.vp_transition(0.4, 0.5, 1.0), tr.vp_prediction("sample", 0.4))
    assert step.gradient_coefficient < 0
    assert step.gradient_balance == pytest.approx(-1 / (step.gradient_coefficient * step.std), rel=1e-12)


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_siblings_have_correlated_standard_noise(spread):
    """Three children a parent: unit variance, covariance 1 / (1 + s^2), none between parents. A covariance of 400 000
    pairs is known to 1 / sqrt(400 000)."""
    shared, own = torch.stack(tensors(200_000, count=2), 0), torch.stack(tensors(200_000, count=6, seed=1), 0)
    noise = tr.sibling_noise(shared, own, spread)
    covariance = noise @ noise.T / 200_000
    same_parent = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).double()
    expected = same_parent / (1 + spread**2) + torch.eye(6) * (1 - 1 / (1 + spread**2))
    assert (covariance - expected).abs().max() < 4 * math.sqrt(2 / 200_000)
    assert noise.mean(1).abs().max() < 4 / math.sqrt(200_000)


def test_siblings_by_hand_and_in_the_limits():
    """s 3/4: (4 shared + 3 own) / 5; row n K + b is child b of parent n."""
    shared, own = torch.tensor([[5.0], [10.0]]), torch.tensor([[0.0], [5.0], [10.0], [-5.0]])
    assert tr.sibling_noise(shared, own, 0.75).flatten().tolist() == pytest.approx([4, 7, 14, 5])
    assert torch.equal(tr.sibling_noise(shared, own, 0.0), shared.repeat_interleave(2, 0))
    assert torch.equal(tr.sibling_noise(shared, own, math.inf), own)
    assert torch.equal(tr.sibling_noise(shared, own[:2], 0.75), own[:2])  # an only child: the sequential rollout
    with pytest.raises(RuntimeError, match="unflatten"):
        tr.sibling_noise(shared, own[:3], 0.75)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_step_is_that_of_diffusers_ddim(kind, eta):
    ddim = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    ddim.set_timesteps(10)
    t = int(ddim.timesteps[4])
    bar, bar_next = (float(ddim.alphas_cumprod[i]) for i in (t, t - 100))
    step = tr.compose(tr.vp_transition(bar**0.5, bar_next**0.5, eta), tr.vp_prediction(kind, bar**0.5))
    x, out, noise = tensors(2, 3, 4, 4, count=3)
    expected = ddim.step(out, t, x, eta=eta, variance_noise=noise).prev_sample
    torch.testing.assert_close(tr.mean(step, x, out) + step.std * noise, expected, atol=1e-5, rtol=0)
    assert step.std == pytest.approx(eta * float(ddim._get_variance(t, t - 100)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_preserving_path_is_a_flow_after_a_change_of_variables(eta):
    """z = x / (a + b) is on the flow path at s = b / (a + b): both ddim steps have to agree there."""
    a, a_next = 0.4, 0.55
    b, b_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
    vp, scale = tr.vp_transition(a, a_next, eta), a_next + b_next
    flow = tr.transition("ddim", b / (a + b), b_next / scale, eta, constants(LEVELS))
    for ours, theirs in zip(vp, flow, strict=True):
        assert ours / scale == pytest.approx(theirs, rel=1e-12, abs=1e-15)


def test_predictions_without_a_clean_estimate_are_refused():
    with pytest.raises(ValueError, match="no clean estimate"):
        tr.vp_prediction("epsilon", 0.0)
    with pytest.raises(ValueError, match="no clean estimate"):
        tr.vp_prediction("unknown", 0.5)
