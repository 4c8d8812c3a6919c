"""The policy: what is trained, what never is, and that plain diffusers loads what was trained."""

import pytest
import torch

from alignment.config import LoRAConfig
from alignment.errors import UserError
from alignment.lora import save_lora
from alignment.policy import as_videos
from alignment.self_check import TOLERANCE
from samplers.transitions import log_ratio
from tests.alignment.tiny import imitate, make_policy, shake
from tests.pipelines import FAMILIES, PROMPTS, STEPS, denoisers

SEEDS = [5, 6]


def plain_video(family, change=lambda pipe: None):
    """What an unmodified pipeline makes of the same prompts and seeds."""
    pipe, call = FAMILIES[family]()
    change(pipe)
    with torch.no_grad():
        return as_videos(pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS])[0])


@pytest.mark.parametrize("family", ["wan", "wan_two_experts", "stable_diffusion_3", "flux", "stable_diffusion"])
def test_reference_is_the_base_before_and_after_training(family):
    policy = make_policy(family)
    base = plain_video(family)
    assert torch.equal(policy.generate(PROMPTS, SEEDS), base)
    optimizer = torch.optim.Adam(policy.parameters.values(), lr=0.02)
    for _ in range(2):
        imitate(policy)
        optimizer.step()
        optimizer.zero_grad()
    assert (policy.generate(PROMPTS, SEEDS) - base).abs().max() > 1e-4
    with policy.reference():
        assert torch.equal(policy.generate(PROMPTS, SEEDS), base)
    assert (policy.generate(PROMPTS, SEEDS) - base).abs().max() > 1e-4


def test_reference_of_full_fine_tuning():
    policy = make_policy(model={"trained": "full"})
    base = plain_video("wan")
    with pytest.raises(RuntimeError, match="keep_reference"), policy.reference():
        pass
    policy.keep_reference()
    shake(policy, 0.02)
    assert (policy.generate(PROMPTS, SEEDS) - base).abs().max() > 1e-4
    with policy.reference():
        assert torch.equal(policy.generate(PROMPTS, SEEDS), base)
    assert (policy.generate(PROMPTS, SEEDS) - base).abs().max() > 1e-4


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_reference_never_receives_a_gradient(trained):
    policy = make_policy(model={"trained": trained})
    policy.keep_reference()
    shake(policy, 0.02)
    trajectory = policy.rollout(PROMPTS, SEEDS, SEEDS, [1, 2]).trajectory
    seen = []
    with policy.reference():
        policy.replay(trajectory, PROMPTS, lambda now, was: seen.append(now.mean.requires_grad))
    assert seen == [False, False]
    policy.replay(trajectory, PROMPTS, lambda now, was: seen.append(now.mean.requires_grad))
    assert seen[2:] == [True, True]


def test_lora_trains_exactly_its_targets():
    policy = make_policy(model={"lora": LoRAConfig(rank=3, alpha=6, targets=["to_q", "to_out.0"])})
    expected = {
        f"transformer.blocks.{block}.{attention}.{layer}.lora_{side}.default.weight"
        for block in (0, 1) for attention in ("attn1", "attn2") for layer in ("to_q", "to_out.0") for side in "AB"
    }  # fmt: skip
    assert set(policy.parameters) == expected
    assert sum(p.numel() for p in policy.parameters.values()) == 8 * 3 * (24 + 24)
    every = [
        p for part in policy.pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()
    ]
    assert {id(p) for p in every if p.requires_grad} == {id(p) for p in policy.parameters.values()}
    scales = {layer.scaling["default"] for layer in policy.pipe.transformer.modules() if hasattr(layer, "scaling")}
    assert scales == {2.0}


def test_full_fine_tuning_trains_exactly_the_denoiser():
    policy = make_policy(model={"trained": "full", "dtype": "bfloat16"})
    assert set(policy.parameters) == {f"transformer.{n}" for n, _ in policy.pipe.transformer.named_parameters()}
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    frozen = [*policy.pipe.vae.parameters(), *policy.pipe.text_encoder.parameters()]
    assert not any(p.requires_grad for p in frozen)


def test_both_experts_learn():
    policy = make_policy("wan_two_experts")
    assert {name.partition(".")[0] for name in policy.parameters} == {"transformer", "transformer_2"}
    imitate(policy)
    for expert in ("transformer.", "transformer_2."):
        gradients = [p.grad for n, p in policy.parameters.items() if n.startswith(expert) and "lora_B" in n]
        assert gradients
        assert all(g.abs().max() > 0 for g in gradients)


def test_a_tail_is_refused_where_there_is_no_flow():
    with pytest.raises(UserError, match="sampler.tail: CogVideoXDDIMScheduler is not a flow's; set it to null"):
        make_policy("cogvideox", sampler={"tail": 0.5})


def test_target_that_matches_nothing_is_refused_with_candidates():
    with pytest.raises(UserError) as error:
        make_policy(model={"lora": LoRAConfig(targets=["to_q", "to_quary"])})
    assert "model.lora.targets: 'to_quary' matches no layer of transformer" in str(error.value)
    assert "near: to_q" in str(error.value)
    for candidate in ("to_out.0", "to_k", "net.2"):
        assert candidate in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_start_the_same_whatever_ran_before():
    torch.manual_seed(1)
    first = make_policy().parameters
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = make_policy().parameters
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    distinct = {float(p.detach().flatten()[0]) for name, p in first.items() if "lora_A" in name}
    assert len(distinct) > 1


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_float32_masters_move_where_bfloat16_ones_stand_still(trained):
    """At lr 1e-5 an Adam step is below half a bfloat16 unit of every weight over 2.6e-3."""
    policy = make_policy(model={"trained": trained, "dtype": "bfloat16"})
    shake(policy)
    start = {n: p.detach().clone() for n, p in policy.parameters.items()}
    low = {n: p.detach().bfloat16().requires_grad_() for n, p in policy.parameters.items()}
    low_start = {n: p.detach().clone() for n, p in low.items()}
    touched = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in start.items()}
    optimizers = [torch.optim.Adam(ps.values(), lr=1e-5) for ps in (policy.parameters, low)]
    for _ in range(8):
        imitate(policy)
        for name, p in policy.parameters.items():
            if p.grad is not None:
                touched[name] |= p.grad.abs() > 1e-6
                low[name].grad = p.grad.bfloat16()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def moved(now, then):
        change = torch.cat([(now[n] != then[n])[touched[n]] for n in now])
        return float(change.float().mean())

    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    assert sum(int(t.sum()) for t in touched.values()) > 0.5 * sum(t.numel() for t in touched.values())
    assert moved(policy.parameters, start) == 1.0
    assert moved(low, low_start) < 0.2


ALL = [name for name in FAMILIES if name not in ("wan_image_to_video", "ltx_image_to_video", "wan_two_experts")]


@pytest.mark.parametrize("family", ALL)
def test_plain_diffusers_loads_the_saved_lora(family, tmp_path):
    policy = make_policy(family)
    shake(policy)
    folder = policy.save(tmp_path)
    assert folder == tmp_path / "lora"
    with_lora = plain_video(family, lambda pipe: pipe.load_lora_weights(folder))
    torch.testing.assert_close(with_lora, policy.generate(PROMPTS, SEEDS), atol=1e-5, rtol=0)
    assert (with_lora - plain_video(family)).abs().max() > 1e-3


def test_plain_diffusers_loads_both_experts(tmp_path):
    policy = make_policy("wan_two_experts")
    shake(policy)
    folder = policy.save(tmp_path)

    def load(pipe):
        pipe.load_lora_weights(folder)
        pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)

    ours = policy.generate(PROMPTS, SEEDS)
    torch.testing.assert_close(plain_video("wan_two_experts", load), ours, atol=1e-5, rtol=0)
    first_only = plain_video("wan_two_experts", lambda pipe: pipe.load_lora_weights(folder))
    assert (first_only - ours).abs().max() > 1e-4


def test_denoiser_loads_the_saved_lora_where_the_pipeline_has_no_loader(tmp_path):
    """As with HunyuanVideo 1.5: the adapters go to one folder a denoiser."""
    policy = make_policy("wan_two_experts")
    shake(policy)
    save_lora(object(), policy.denoisers, tmp_path / "lora")

    def load(pipe):
        for name in ("transformer", "transformer_2"):
            file = "pytorch_lora_weights.safetensors"
            getattr(pipe, name).load_lora_adapter(tmp_path / "lora" / name, prefix=None, weight_name=file)

    ours = policy.generate(PROMPTS, SEEDS)
    torch.testing.assert_close(plain_video("wan_two_experts", load), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["wan_two_experts", "stable_diffusion"])
def test_plain_diffusers_loads_saved_full_weights(family, tmp_path):
    policy = make_policy(family, model={"trained": "full"})
    shake(policy, 0.02)
    policy.save(tmp_path)

    def load(pipe):
        for name in policy.denoisers:
            setattr(pipe, name, type(policy.denoisers[name]).from_pretrained(tmp_path / name))

    torch.testing.assert_close(plain_video(family, load), policy.generate(PROMPTS, SEEDS), atol=1e-6, rtol=0)


def test_saving_again_replaces_the_folder(tmp_path):
    policy = make_policy()
    policy.save(tmp_path)
    shake(policy)
    policy.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    video = plain_video("wan", lambda pipe: pipe.load_lora_weights(tmp_path / "lora"))
    torch.testing.assert_close(video, policy.generate(PROMPTS, SEEDS), atol=1e-5, rtol=0)


def test_using_other_weights_is_undone_after_an_exception():
    policy = make_policy()
    kept = {n: p.detach().clone() for n, p in policy.parameters.items()}
    other = {n: torch.full_like(p, 0.1) for n, p in policy.parameters.items()}
    before = policy.generate(PROMPTS, SEEDS)
    with policy.using(other):
        assert (policy.generate(PROMPTS, SEEDS) - before).abs().max() > 1e-4
    with pytest.raises(OSError, match="on purpose"), policy.using(other):
        raise OSError("on purpose")
    assert all(torch.equal(p, kept[n]) for n, p in policy.parameters.items())
    assert torch.equal(policy.generate(PROMPTS, SEEDS), before)


@pytest.mark.parametrize("family", ["wan", "stable_diffusion"])
def test_gradient_checkpointing_changes_nothing(family):
    gradients = []
    for on in (False, True):
        policy = make_policy(family, model={"gradient_checkpointing": on})
        shake(policy)
        imitate(policy)
        gradients.append({n: p.grad for n, p in policy.parameters.items()})
        assert any(getattr(m, "gradient_checkpointing", False) for m in denoisers(policy.pipe)[0].modules()) == on
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", ["wan", "ltx_image_to_video", "stable_diffusion_3"])
def test_rollout_and_replay_agree_under_autocast(family, trained):
    policy = make_policy(family, model={"dtype": "bfloat16", "trained": trained})
    shake(policy, 0.02)
    rollout = policy.rollout(PROMPTS, SEEDS, SEEDS, [1, 2, 3])
    ratios = []

    def visit(now, was):
        ratio = log_ratio(was.x_next, now.mean, was.mean, now.step.std)
        ratios.append(float(ratio.detach().abs().max()))
        assert now.mean.dtype == was.x_next.dtype == torch.float32
        now.mean.sum().backward()

    policy.replay(rollout.trajectory, PROMPTS, visit)
    assert len(ratios) == 3
    assert max(ratios) <= TOLERANCE[torch.bfloat16] / 10
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters.values())
    exact = make_policy(family, model={"trained": trained})
    shake(exact, 0.02)
    other = exact.rollout(PROMPTS, SEEDS, SEEDS, [1, 2, 3]).trajectory
    assert not torch.equal(other.steps[0].mean, rollout.trajectory.steps[0].mean)


def test_attention_backend():
    video = make_policy(model={"attention": "native"}).generate(PROMPTS, SEEDS)
    torch.testing.assert_close(video, plain_video("wan"), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="model.attention: 'nativ'"):
        make_policy(model={"attention": "nativ"})


@pytest.mark.parametrize(
    ("family", "call", "expected"),
    [
        ("wan", {"guidance_scale": 1.0}, 2 * STEPS),
        ("wan", {"guidance_scale": 3.0}, 4 * STEPS),  # two calls a step
        ("wan_two_experts", {}, 4 * STEPS),
        ("stable_diffusion", {"guidance_scale": 3.0}, 4 * STEPS),  # one call of twice the rows
        ("flux", {}, 2 * STEPS),  # distilled guidance
    ],
)
def test_function_evaluations_are_counted(family, call, expected):
    policy = make_policy(family, call=call)
    trajectory = policy.rollout(PROMPTS, SEEDS, SEEDS, [1, 3]).trajectory
    assert policy.evaluations == expected
    policy.replay(trajectory, PROMPTS, lambda now, was: None)
    assert policy.evaluations == expected + expected * 2 // STEPS


def test_decoding_is_timed():
    policy = make_policy()
    trajectory = policy.rollout(PROMPTS, SEEDS, SEEDS, [1]).trajectory
    once = policy.decode_seconds
    assert once > 0
    policy.replay(trajectory, PROMPTS, lambda now, was: None)
    assert policy.decode_seconds == once
    policy.generate(PROMPTS, SEEDS)
    assert policy.decode_seconds > once
    assert "decode" not in vars(policy.pipe.vae)


@pytest.mark.parametrize(
    ("family", "frames"), [("stable_diffusion_3", 1), ("flux", 1), ("stable_diffusion", 1), ("wan", 5)]
)
def test_images_are_videos_of_one_frame(family, frames):
    policy = make_policy(family)
    for videos in (policy.generate(PROMPTS, SEEDS), as_videos(policy.rollout(PROMPTS, SEEDS, SEEDS, []).frames)):
        assert videos.shape == (2, frames, 3, 16, 16)
        assert videos.dtype == torch.float32
        assert 0 <= videos.min() < videos.max() <= 1


@pytest.mark.parametrize("family", ["wan", "stable_diffusion_3"])
def test_shift_of_the_recipe_reaches_the_sampler(family):
    """A shift s maps level u to s u / (1 + (s - 1) u), so two shifts differ in every inner level."""
    levels = []
    for shift in (3.0, 6.0):
        policy = make_policy(family, sampler={"shift": shift, "grid": "uniform"})
        policy.rollout(PROMPTS, SEEDS, SEEDS, [])
        u = 1 - 1 / STEPS
        assert policy.scheduler.levels[1] == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-6)
        levels.append(policy.scheduler.levels[1])
        policy.generate(PROMPTS, SEEDS)
        assert policy.stock.config.get("flow_shift", policy.stock.config.get("shift")) == shift
    assert levels[0] < levels[1]


def test_shift_of_a_model_without_one_is_refused():
    with pytest.raises(UserError, match="sampler.shift: DDIMScheduler has no time shift"):
        make_policy("stable_diffusion", sampler={"shift": 3.0})
