"""Latent rewards: what they read of a pipeline, what they make of it, what their files hold."""

import json
import math
import re

import pytest
import torch
from torch import nn

from alignment.config import LoRAConfig, ModelConfig, SamplerConfig
from alignment.errors import UserError
from alignment.latent_reward import Design, LatentClipReward, LatentReward
from alignment.latent_reward.blocks import blocks_of, width_of
from alignment.latent_reward.head import Head
from alignment.latent_reward.model import CARD, WEIGHTS, at_level
from alignment.self_check import self_check
from rewards import RewardError, load
from samplers.rollout import patched
from tests.alignment.tiny import DECIDED, shake
from tests.pipelines import FAMILIES, PROMPTS

VIDEO = ["wan", "wan_two_experts", "skyreels_v2", "sana_video", "hunyuan_video", "ltx", "mochi"]
SHAPES = {"wan": (2, 2, 24), "hunyuan_video": (2, 2, 20)}  # samples, tokens, width
DIMENSIONS = ("VQ", "MQ")


def make_reward(family="wan", **options) -> LatentReward:
    """One block with LoRA, its weights off their start."""
    pipe, call = FAMILIES[family]()
    call = {key: value for key, value in call.items() if key not in (*DECIDED, "image")}
    call |= {key: 1.0 for key in ("guidance_scale", "guidance_scale_2") if key in call}
    model = ModelConfig(path=family, lora=LoRAConfig(rank=2, alpha=4, targets=["to_q", "to_v"]))
    for key in ("trained", "gradient_checkpointing"):
        setattr(model, key, options.pop(key, getattr(model, key)))
    design = Design(**{"layer": 1, "dimensions": DIMENSIONS, "fps": 8.0, **options})
    reward = LatentReward(pipe, model, SamplerConfig(steps=5), call, "cpu", design=design)
    shake(reward)
    return reward


@pytest.fixture(scope="module")
def reward() -> LatentReward:
    return make_reward()


@pytest.fixture(scope="module")
def states(reward) -> torch.Tensor:
    state = reward.rollout(PROMPTS, [0, 1], [2, 3], [], stochastic=(), output_type="latent").state
    return torch.randn(state.shape, generator=torch.Generator().manual_seed(5))


def spied(reward, state, level, **call):
    """What the first block gives in a whole pass of the pipeline, and whether the last block runs."""
    outputs, last = [], []
    for denoiser in reward.denoisers.values():
        blocks = list(blocks_of(denoiser).values())
        blocks[0].register_forward_hook(lambda *given: outputs.append(given[-1]))
        blocks[-1].register_forward_hook(lambda *given: last.append(given[-1]))
    trajectory = at_level(state, level, reward.injectable, (0,) * len(state))
    reward.replay(trajectory, PROMPTS[: len(state)], lambda moment, recorded: None, **call)
    return outputs, last


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_early_exit_gives_the_hidden_states_of_a_whole_pass(family):
    reward = make_reward(family)
    state = reward.rollout(PROMPTS, [0, 1], [2, 3], [], stochastic=(), output_type="latent").state
    with torch.no_grad():
        outputs, last = spied(reward, state, 0.7)
        ran = len(last)
        hidden = reward.hidden_states(at_level(state, 0.7, True, (0, 0)), PROMPTS)
    whole = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]  # of two streams the video's
    assert hidden.shape == whole.shape == SHAPES[family]
    assert torch.equal(hidden, whole)
    assert ran == len(last) == 1  # the early exit ran no further block


def test_a_state_that_enters_through_a_step_of_its_own():
    """Where the prepared latents are not the state, the first pass sees something else."""
    reward = make_reward("ltx_image_to_video")
    image = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    rollout = reward.rollout(PROMPTS[:1], [0], [2], [0], stochastic=(), output_type="latent", **image)
    reward.injectable = rollout.trajectory.injectable
    assert not reward.injectable
    state = rollout.trajectory.steps[0].x
    with torch.no_grad():
        outputs, _ = spied(reward, state, 0.5, **image)
        hidden = reward.hidden_states(at_level(state, 0.5, False, (0,)), PROMPTS[:1], **image)
    assert len(outputs) >= 2
    assert torch.equal(hidden, outputs[1])


@pytest.mark.parametrize("family", VIDEO)
def test_blocks_and_their_width(family):
    pipe, _ = FAMILIES[family]()
    transformer = pipe.transformer
    blocks = blocks_of(transformer)
    wide = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    assert len(blocks) == 2
    assert [width_of(block) for block in blocks.values()] == [wide, wide]


def test_two_streams_come_before_one_and_text_alone_does_not_count():
    class TwoStreams(nn.Linear):
        def forward(self, hidden_states, encoder_hidden_states): ...

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.refiner = nn.ModuleList([nn.Linear(2, 2)])
            self.double = nn.ModuleList([TwoStreams(2, 2) for _ in range(2)])
            self.single = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
            self.after = nn.ModuleList([TwoStreams(2, 2)])

    assert list(blocks_of(Network())) == ["double.0", "double.1", "single.0", "single.1", "single.2"]


def test_head_by_hand():
    """One query and one head: softmax of scaled products, in float64, token by token."""
    torch.manual_seed(0)
    head, hidden, level = Head(3, 2), 5 * torch.randn(2, 4, 3) + 1, torch.tensor([0.3, 0.9])
    assert head.attention.num_heads == 1
    w = {name: p.detach().double() for name, p in head.named_parameters()}
    for row in range(2):
        tokens = []
        for token in hidden[row].double():
            centred = token - token.mean()
            tokens.append(w["norm.weight"] * centred / (centred.square().mean() + 1e-5).sqrt() + w["norm.bias"])
        x = torch.stack(tokens)
        wq, wk, wv = w["attention.in_proj_weight"].chunk(3)
        pooled = []
        for query in w["queries"]:
            logits = (x @ wk.T) @ (wq @ query) / math.sqrt(3)
            value = (logits.exp() / logits.exp().sum()) @ (x @ wv.T)
            pooled.append(w["attention.out_proj.weight"] @ value)
        angle = 1000 * level[row].double()
        time = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)])  # width 3: one frequency, and padding
        inner = w["hidden.weight"] @ torch.cat(pooled) + w["hidden.bias"] + w["level.weight"] @ time + w["level.bias"]
        expected = w["out.weight"] @ (inner * inner.sigmoid())
        assert torch.allclose(head(hidden, level)[row].double(), expected, atol=1e-4)


def test_head_computes_in_float32_under_autocast():
    head, hidden, level = Head(8, 1), torch.randn(1, 3, 8), torch.tensor([0.5])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden, level), head(hidden, level))
        assert head(hidden, level).dtype == torch.float32
        inside = head(hidden, level)
    assert torch.equal(inside, head(hidden, level))


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_gradient_to_the_states(family):
    """Along a random direction, by central differences."""
    reward = make_reward(family)
    draw = torch.Generator().manual_seed(1)
    state = reward.rollout(PROMPTS, [0, 1], [2, 3], [], stochastic=(), output_type="latent").state.requires_grad_()
    score = reward.score(state, 0.6, PROMPTS)
    assert score.shape == (2, 2)
    (gradient,) = torch.autograd.grad(score[1, 0], state)
    assert not gradient[0].any()  # samples do not see each other
    assert gradient[1].any()
    direction = gradient / gradient.norm() + 0.3 * torch.randn(state.shape, generator=draw) / state[0].numel() ** 0.5
    with torch.no_grad():
        step = 0.05
        ends = [reward.score(state + sign * step * direction, 0.6, PROMPTS)[1, 0] for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.02)


def test_checkpointing_changes_nothing(states):
    found = []
    for checkpointing in (False, True):
        reward = make_reward(gradient_checkpointing=checkpointing)
        state = states.clone().requires_grad_()
        reward.score(state, 0.6, PROMPTS).sum().backward()
        found.append([state.grad, *(p.grad for p in reward.parameters.values())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    held = []  # a checkpoint that was left open would still look at what autograd saves
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        (torch.ones(2, requires_grad=True) ** 2).sum()
    assert held


def test_a_level_for_each_sample(reward, states):
    levels = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        each = torch.cat([reward.score(states[i : i + 1], float(levels[i]), PROMPTS[i : i + 1]) for i in range(2)])
        assert (each[0] - reward.score(states[:1], 0.9, PROMPTS[:1])[0]).abs().max() > 1e-3
        for levels_each in (False, True):  # one by one, or in one pass
            reward.levels_each = levels_each
            assert torch.allclose(reward.score(states, levels, PROMPTS), each, atol=1e-5)
        reward.levels_each = False


def test_embeddings_in_place_of_prompts(reward, states):
    with torch.no_grad():
        embeds, _ = reward.pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=32)
        given = reward.score(states, 0.5, None, prompt_embeds=embeds)
        assert torch.allclose(given, reward.score(states, 0.5, PROMPTS), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, r"transformer\.blocks\.0\.attn[12]\.to_[qv]\.lora_[AB]\.default\.weight"),
        ({"trained": "full"}, r"transformer\.blocks\.0\..*"),
        ({"frozen": True}, None),
    ],
)
def test_what_is_trained(options, trained):
    """Of the blocks only those that run; the self-check asks for no gradient where the head alone learns."""
    reward = make_reward(**options)
    self_check(reward, PROMPTS[0])
    names = [name for name in reward.parameters if not name.startswith("head.")]
    assert all(re.fullmatch(trained, name) for name in names) if trained else not names
    assert {p.dtype for p in reward.parameters.values()} == {torch.float32}
    with_gradient = {name for name, p in reward.pipe.transformer.named_parameters() if p.requires_grad}
    assert {f"transformer.{name}" for name in with_gradient} == set(names)
    if options.get("trained") == "full":
        whole = dict(reward.pipe.transformer.blocks[0].named_parameters())
        assert {f"transformer.blocks.0.{name}" for name in whole} == set(names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base):
    """A reward on the saved pipeline, and its folder."""
    reward = make_reward()
    reward.model.path = str(base)
    reward.levels_each = True
    folder = tmp_path_factory.mktemp("rewarded")
    assert reward.save(folder) == folder / "latent_reward"
    return reward, folder


@pytest.mark.parametrize("part", ["", "latent_reward"])
def test_saved_and_loaded(saved, states, part):
    reward, folder = saved
    loaded = LatentReward.load(folder / part, "cpu")
    assert loaded.dimensions == list(DIMENSIONS)
    assert loaded.levels_each
    assert loaded.design == reward.design
    with torch.no_grad():
        expected = reward.score(states, 0.4, PROMPTS)
        assert torch.allclose(loaded.score(states, 0.4, PROMPTS), expected, atol=1e-6)
    assert not any(p.requires_grad for p in [*loaded.head.parameters(), *loaded.pipe.transformer.parameters()])


def copied(saved, tmp_path, **changed):
    _, folder = saved
    target = tmp_path / "latent_reward"
    target.mkdir()
    card = json.loads((folder / "latent_reward" / CARD).read_text())
    (target / CARD).write_text(json.dumps({**card, **changed}))
    (target / WEIGHTS).write_bytes((folder / "latent_reward" / WEIGHTS).read_bytes())
    return target


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / CARD).unlink(), "holds no reward.json; name the folder of a run of latent_reward"),
        (lambda folder: (folder / CARD).write_text("{"), "reward.json: cannot be read"),
        (lambda folder: (folder / CARD).write_text('{"layer": 1}'), "reward.json: is no reward's: 'model'"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"12345678"), "weights.safetensors is missing or damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "weights.safetensors is missing or damaged"),
    ],
)
def test_files_that_do_not_fit(saved, tmp_path, spoil, said):
    folder = copied(saved, tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=said) as caught:
        LatentReward.load(folder, "cpu")
    assert "\n" not in str(caught.value)


def test_weights_of_another_reward(saved, tmp_path):
    with pytest.raises(UserError, match="are not those that reward.json beside it speaks of"):
        LatentReward.load(copied(saved, tmp_path, dimensions=["VQ"]), "cpu")


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(UserError, match=f"algorithm.layer: {layer} is not between 1 and 1; .* has 2 blocks"):
        make_reward(layer=layer)


def test_a_network_without_blocks():
    with pytest.raises(UserError, match="is no stack of blocks"):
        blocks_of(nn.Sequential(nn.Linear(2, 2)))


def test_clips(saved, base):
    """Encoded, noised by hand and scored; one noise for all, the mean over levels."""
    reward, folder = saved
    videos = torch.rand((3, 5, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    prompts = [*PROMPTS, PROMPTS[0]]
    found = load("alignment.latent_reward:LatentClipReward", path=folder, levels=[0.2, 0.6], device="cpu", batch=2)
    seen = []

    def spy(score):
        def noted(states, level, texts):
            seen.append((states, level))
            return score(states, level, texts)

        return noted

    with patched(found.reward, "score", spy):
        scores = found(videos, prompts, fps=8)
    with torch.no_grad():
        clean = reward.encoder(PROMPTS[0])(videos)
        values = []
        for level in (0.6, 0.2):
            mine = [states for states, at in seen if at == level]
            noises = (torch.cat(mine) - (1 - level) * clean) / level
            assert torch.allclose(noises, noises[:1].expand_as(noises), atol=1e-4)
            assert noises.std() == pytest.approx(1, abs=0.2)
            values.append(reward.score(torch.cat(mine), level, prompts))
    expected = torch.stack(values).mean(0)
    for name, column in zip(DIMENSIONS, expected.unbind(1), strict=True):
        assert torch.allclose(scores.dims[name], column, atol=1e-4)
    assert torch.allclose(scores.total, expected.mean(1), atol=1e-4)


def test_clips_that_cannot_be_scored(saved, tmp_path):
    _, folder = saved
    with pytest.raises(RewardError, match="levels are .0., expected some above 0"):
        load("alignment.latent_reward:LatentClipReward", path=folder, levels=[0])
    with pytest.raises(RewardError, match="holds no reward.json"):
        load("alignment.latent_reward:LatentClipReward", path=tmp_path)
    reward = LatentClipReward(folder, device="cpu")
    with pytest.raises(RewardError, match="the clip of 'a' is too short: 2 frames"):
        reward(torch.rand(1, 2, 3, 16, 16), ["a"], fps=8)
