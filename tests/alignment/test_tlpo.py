"""TLPO: what a gate makes of its experts, against merged weights; what updates do to it; what a run leaves behind."""

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from alignment.algorithms import tlpo
from alignment.checkpoint import checkpoints, load_state
from alignment.config import LoRAConfig, ModelConfig, SamplerConfig
from alignment.data import Prompt, read_preferences
from alignment.errors import UserError
from alignment.experts import GatedPolicy, load_gated
from alignment.gates import Gate, seen_timesteps
from alignment.metrics import read_metrics
from alignment.pairs import reference_weights, update
from alignment.policy import as_videos
from alignment.preference import batches, look_at_pipeline
from alignment.tally import Tally
from tests.alignment.test_pairs import UNGUIDED, random_examples
from tests.alignment.tiny import DECIDED, make_policy, make_run, shake
from tests.pipelines import FAMILIES, PROMPTS, STEPS

SEEDS = [5, 6]
SIZES = {"VQ": LoRAConfig(rank=3, alpha=6), "MQ": LoRAConfig(rank=4, alpha=4, targets=["to_q", "to_out.0"])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Experts of a family by name: folders that hold lora/, as stage 1 leaves them; they differ in rank and layers."""
    made = {}

    def experts(family="wan", sizes=SIZES):
        key = (family, tuple(sizes))
        if key not in made:
            made[key] = {}
            for seed, (name, lora) in enumerate(sizes.items()):
                policy = make_policy(family, model={"lora": lora})
                shake(policy, 0.3, seed)
                made[key][name] = tmp_path_factory.mktemp("expert")
                policy.save(made[key][name])
        return made[key]

    return experts


def gated(experts, family="wan", model=None, sampler=None, call=None, width=8):
    """As tests.alignment.tiny.make_policy."""
    pipe, given = FAMILIES[family]()
    config = ModelConfig(path=family, **(model or {}))
    if config.dtype != "float32":
        pipe.to(getattr(torch, config.dtype))
    given = {key: value for key, value in given.items() if key not in DECIDED}
    options = SamplerConfig(**{"steps": STEPS, "kernel": "ode", **(sampler or {})})
    return GatedPolicy(pipe, config, options, {**given, **(call or {})}, "cpu", experts=experts, width=width)


def gated_run(folder, experts, family="wan", model=None, **recipe):
    """A run in its first iteration, not guided, the gate at its start."""
    call = {} if family == "hunyuan_video" else UNGUIDED
    policy = gated(experts, family, model, {"shared_noise": False}, call)
    config = tlpo.Config(
        beta=20.0, prompts_per_iteration=2, group_size=3, experts={n: str(p) for n, p in experts.items()}
    )
    run = make_run(folder, policy, config, **recipe)
    look_at_pipeline(policy, config, run.stream.prompts[0])
    run.iteration, run.row = 1, {}
    return run


def choose(policy, column):
    """Only this expert, at all timesteps and in all layers."""
    for gate in policy.gates.values():
        with torch.no_grad():
            gate.out.weight.zero_()
            gate.out.bias.fill_(-1000.0)[column] = 0.0


def plain_video(family, change=lambda pipe: None):
    pipe, call = FAMILIES[family]()
    change(pipe)
    with torch.no_grad():
        return as_videos(pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS])[0])


def load_lora(folder, pipe):
    """As the README of diffusers has it."""
    pipe.load_lora_weights(folder / "lora")
    if (folder / "lora" / "transformer_2").is_dir():
        pipe.load_lora_weights(folder / "lora" / "transformer_2", load_into_transformer_2=True)


def delta(folder, layer, lora):
    """alpha / r B A, from the file."""
    weights = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    names = [f"transformer.{layer}.lora_{side}.weight" for side in "BA"]
    if names[0] not in weights:
        return 0.0
    return lora.alpha / lora.rank * weights[names[0]] @ weights[names[1]]


def wan_inputs():
    draw = torch.Generator().manual_seed(3)
    shapes = {"hidden_states": (2, 16, 2, 2, 2), "encoder_hidden_states": (2, 8, 16)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} | {"return_dict": False}


class TestGate:
    def test_formula(self):
        torch.manual_seed(0)
        gate = Gate(num_layers=3, num_experts=2, width=4)
        torch.nn.init.normal_(gate.out.weight)
        found = gate(torch.tensor([900.0, 3.0]))
        for b, t in enumerate((900.0, 3.0)):
            for layer in range(3):
                time = torch.tensor([math.cos(t), math.cos(t / 100), math.sin(t), math.sin(t / 100)])
                inner = gate.hidden.weight @ torch.cat([time, gate.layers[layer]]) + gate.hidden.bias
                logits = gate.out.weight @ (inner / (1 + torch.exp(-inner))) + gate.out.bias
                expected = torch.exp(logits) / torch.exp(logits).sum()
                assert torch.allclose(found[b, layer], expected, atol=1e-5)
        assert torch.allclose(found.sum(-1), torch.ones(2, 3))
        assert found.std((0, 1)).min() > 0.01  # not the same everywhere

    def test_starts_with_equal_parts(self):
        assert torch.equal(Gate(4, 3, 8)(torch.tensor([0.0, 500.0, 1000.0])), torch.full((3, 4, 3), 1 / 3))

    def test_timestep_of_a_call(self):
        names = ["sample", "timestep", "text"]
        one = torch.tensor(7)
        assert seen_timesteps(names, (None, one, None), {}).tolist() == [7]
        assert seen_timesteps(names, (None,), {"timestep": 7.5}).tolist() == [7.5]
        assert seen_timesteps(names, (), {"timestep": torch.tensor([3.0, 4.0])}).tolist() == [3, 4]
        of_tokens = torch.tensor([[0.0, 9.0], [8.0, 8.0]])  # an image's tokens are clean
        assert seen_timesteps(names, (), {"timestep": of_tokens}).tolist() == [9, 8]


class TestFusion:
    @pytest.mark.parametrize("family", ["wan", "ltx", "wan_two_experts", "stable_diffusion_3"])
    @pytest.mark.parametrize("column", [0, 1])
    def test_one_expert_alone(self, family, column, trained):
        experts = trained(family)
        policy = gated(experts, family)
        choose(policy, column)
        alone = plain_video(family, partial(load_lora, list(experts.values())[column]))
        assert (alone - plain_video(family)).abs().max() > 1e-3
        assert torch.allclose(policy.generate(PROMPTS, SEEDS), alone, atol=1e-6)

    def test_equal_experts_in_equal_parts_are_one(self, trained):
        expert = trained()["VQ"]
        policy = gated({"one": expert, "same": expert, "again": expert})
        alone = plain_video("wan", partial(load_lora, expert))
        assert torch.allclose(policy.generate(PROMPTS, SEEDS), alone, atol=1e-5)

    def test_each_sample_has_the_weights_of_its_own_timestep(self, trained):
        experts = trained()
        policy = gated(experts)
        shake(policy, 1.0)
        transformer, gate = policy.pipe.transformer, policy.gates["transformer"]
        timesteps, inputs = torch.tensor([950.0, 120.0]), wan_inputs()
        with torch.no_grad():
            found = transformer(timestep=timesteps, **inputs)[0]
            shares = gate(timesteps)
        assert (shares[0] - shares[1]).abs().max() > 0.1
        names = ("to_q", "to_k", "to_v", "to_out.0")
        layers = [f"blocks.{b}.attn{a}.{name}" for b in (0, 1) for a in (1, 2) for name in names]
        for b in (0, 1):
            pipe, _ = FAMILIES["wan"]()
            with torch.no_grad():
                for row, layer in enumerate(layers):
                    weight = pipe.transformer.get_submodule(layer).weight
                    for k, (name, folder) in enumerate(experts.items()):
                        weight += shares[b, row, k] * delta(folder, layer, SIZES[name])
                merged = pipe.transformer(timestep=timesteps, **inputs)[0]
            assert torch.allclose(found[b], merged[b], atol=1e-5)
            assert (found[1 - b] - merged[1 - b]).abs().max() > 1e-4

    def test_gradient_of_the_gate(self, trained):
        """The slope along random directions, by central differences."""
        policy = gated(trained())
        shake(policy, 0.5)
        policy.pipe.transformer.double()
        inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in wan_inputs().items()}
        target = torch.randn((2, 16, 2, 2, 2), generator=torch.Generator().manual_seed(4)).double()

        def loss():
            velocity = policy.pipe.transformer(timestep=torch.tensor([950.0, 120.0]), **inputs)[0]
            return (velocity - target).square().mean((1, 2, 3, 4)) @ torch.tensor([1.0, -2.0]).double()

        loss().backward()
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            ways = {n: torch.randn(p.shape, generator=draw).double() for n, p in policy.parameters.items()}
            step, values = 1e-3, []
            for sign in (1, -1):
                moved = {n: p.data + sign * step * ways[n] for n, p in policy.parameters.items()}
                with torch.no_grad(), policy.using(moved):
                    values.append(float(loss()))
            slope = sum(float((p.grad * ways[n]).sum()) for n, p in policy.parameters.items())
            assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-6)
            assert abs(slope) > 1e-5

    def test_rows_that_fit_no_timestep_are_refused(self, trained):
        policy = gated(trained())
        policy.gates["transformer"].weights = torch.ones(2, 16, 2)
        with pytest.raises(ValueError, match="2 timesteps for 3 rows"):
            policy.pipe.transformer.blocks[0].attn1.to_q(torch.zeros(3, 4, 24))


class TestUpdate:
    @pytest.mark.parametrize("family", ["wan", "ltx", "hunyuan_video", "wan_two_experts"])
    def test_starts_at_log_2_with_the_mixture_as_reference(self, tmp_path, family, trained, monkeypatch):
        run = gated_run(tmp_path, trained(family), family)
        monkeypatch.setattr(run, "apply_update", lambda: None)
        tally, examples = Tally(), random_examples(run, 2)
        update(run, examples, partial(tlpo.losses, run, tally), tally)
        found = tally.metrics(run)
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert found["margin/size"] == 0
        assert found["error/winner"] == found["error/loser"] == 1
        batch = next(batches(run, examples))
        ours = batch.errors_under(reference_weights(run))
        for denoiser in run.policy.denoisers.values():
            denoiser.disable_adapters()
        assert (batch.errors_under(torch.no_grad()) - ours).abs().max() > 1e-4

    @pytest.mark.parametrize("family", ["wan", "ltx"])
    def test_moves_the_gate_and_nothing_else(self, tmp_path, family, trained):
        run = gated_run(tmp_path, trained(family), family)
        denoiser = run.policy.pipe.transformer
        before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
        for _ in range(2):
            update(run, random_examples(run, 2), partial(tlpo.losses, run, Tally()), Tally())
        moved = {name for name, p in denoiser.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {f"expert_gate.{name}" for name, _ in run.policy.gates["transformer"].named_parameters()}
        assert not any(p.requires_grad for name, p in denoiser.named_parameters() if "expert_gate" not in name)
        assert any("lora_" in name for name in before)

    def test_descends(self, tmp_path, trained):
        """Updates on the same pairs lower their loss, which a flipped sign would raise."""
        run = gated_run(tmp_path, trained())
        found, examples = [], random_examples(run, 3)
        for _ in range(6):
            tally = Tally()
            update(run, examples, partial(tlpo.losses, run, tally), tally)
            found.append(tally.metrics(run)["loss"])
        assert found[-1] < found[0] - 1e-4
        assert tally.metrics(run)["margin"] > 0

    def test_reference_stays_the_mixture(self, tmp_path, trained):
        run = gated_run(tmp_path, trained())
        start = run.policy.generate(PROMPTS, SEEDS)
        shake(run.policy, 1.0)
        assert (run.policy.generate(PROMPTS, SEEDS) - start).abs().max() > 1e-4
        with run.policy.reference():
            assert torch.equal(run.policy.generate(PROMPTS, SEEDS), start)

    def test_checkpointed_gradients_are_the_same(self, tmp_path, trained, monkeypatch):
        found = []
        for saving in (False, True):
            run = gated_run(tmp_path / str(saving), trained(), model={"gradient_checkpointing": saving})
            run.policy.pipe.transformer.train(saving)  # which some models ask for
            shake(run.policy, 0.5)
            monkeypatch.setattr(run, "apply_update", lambda: None)
            update(run, random_examples(run, 2), partial(tlpo.losses, run, Tally()), Tally())
            found.append({name: p.grad for name, p in run.policy.parameters.items()})
        for name, gradient in found[0].items():
            assert gradient.abs().max() > 0, name
            assert torch.allclose(gradient, found[1][name], atol=1e-7), name

    def test_lower_precision(self, tmp_path, trained):
        run = gated_run(tmp_path, trained(), model={"dtype": "bfloat16"})
        assert {p.dtype for p in run.policy.parameters.values()} == {torch.float32}
        before = {name: p.detach().clone() for name, p in run.policy.parameters.items()}
        tally = Tally()
        for _ in range(2):
            update(run, random_examples(run, 2), partial(tlpo.losses, run, tally), tally)
        assert all(not torch.equal(p, before[name]) for name, p in run.policy.parameters.items())


class TestFiles:
    @pytest.mark.parametrize("family", ["wan", "ltx", "wan_two_experts", "mochi", "stable_diffusion"])
    def test_loads_on_a_plain_pipeline(self, tmp_path, family, trained):
        policy = gated(trained(family), family)
        shake(policy, 1.0)
        policy.save(tmp_path)
        video = policy.generate(PROMPTS, SEEDS)
        for folder in (tmp_path, tmp_path / "gated"):
            assert torch.equal(plain_video(family, lambda pipe, folder=folder: load_gated(pipe, folder)), video)
        with policy.reference():
            assert (policy.generate(PROMPTS, SEEDS) - video).abs().max() > 1e-4

    def test_loads_in_lower_precision(self, tmp_path, trained):
        policy = gated(trained(), model={"dtype": "bfloat16"})
        policy.save(tmp_path)

        def load(pipe):
            pipe.to(torch.bfloat16)
            load_gated(pipe, tmp_path)

        assert (plain_video("wan", load) - policy.generate(PROMPTS, SEEDS)).abs().max() < 0.05

    @pytest.mark.parametrize("family", ["wan", "ltx", "wan_two_experts"])
    def test_plain_lora_is_a_gate_that_is_the_same_at_all_timesteps(self, tmp_path, family, trained):
        policy = gated(trained(family), family)
        for gate in policy.gates.values():
            torch.nn.init.normal_(gate.out.bias)
        policy.find_timesteps(Prompt(PROMPTS[0], {}), None)
        policy.save(tmp_path)
        video = plain_video(family, partial(load_lora, tmp_path))
        assert torch.allclose(video, policy.generate(PROMPTS, SEEDS), atol=1e-5)

    def test_plain_lora_is_the_mean_over_the_timesteps_of_sampling(self, tmp_path, trained):
        experts = trained()
        policy = gated(experts)
        shake(policy, 1.0)
        policy.find_timesteps(Prompt(PROMPTS[0], {}), 4)
        policy.stock.set_timesteps(4)
        timesteps = policy.stock.timesteps.float()
        assert policy.timesteps["transformer"].tolist() == sorted(timesteps.tolist())
        shares = policy.gates["transformer"](timesteps).mean(0)
        policy.save(tmp_path)
        one = LoRAConfig(rank=1, alpha=1)  # whose scale is 1
        for row, layer in ((0, "blocks.0.attn1.to_q"), (1, "blocks.0.attn1.to_k"), (15, "blocks.1.attn2.to_out.0")):
            expected = sum(
                shares[row, k] * delta(folder, layer, SIZES[n]) for k, (n, folder) in enumerate(experts.items())
            )
            assert torch.allclose(delta(tmp_path, layer, one), expected, atol=1e-6)

    def test_without_lora_loading(self, tmp_path, trained, monkeypatch):
        """Some pipelines have denoisers that take adapters, and no loader of their own."""
        import diffusers

        cls = diffusers.LTXPipeline
        for name in ("save_lora_weights", "load_lora_weights"):
            owner = next(c for c in cls.__mro__ if name in vars(c))
            monkeypatch.delattr(owner, name)
            while owner := next((c for c in cls.__mro__ if name in vars(c)), None):
                monkeypatch.delattr(owner, name)
        experts = {}
        for seed, name in enumerate(SIZES):
            policy = make_policy("ltx", model={"lora": SIZES[name]})
            shake(policy, 0.3, seed)
            experts[name] = tmp_path / name
            policy.save(experts[name])
        assert (experts["VQ"] / "lora/transformer/pytorch_lora_weights.safetensors").is_file()
        policy = gated(experts, "ltx")
        policy.save(tmp_path / "run")
        found = plain_video("ltx", lambda pipe: load_gated(pipe, tmp_path / "run"))
        assert torch.equal(found, policy.generate(PROMPTS, SEEDS))

        def load(pipe):
            where = tmp_path / "run/lora/transformer"
            pipe.transformer.load_lora_adapter(where, prefix=None, weight_name="pytorch_lora_weights.safetensors")

        assert torch.allclose(plain_video("ltx", load), found, atol=1e-5)  # equal parts at all timesteps

    def test_what_is_no_gate_is_refused(self, tmp_path, trained):
        pipe, _ = FAMILIES["wan"]()
        with pytest.raises(UserError, match="holds no gate.json"):
            load_gated(pipe, trained()["VQ"])

    def test_other_layers_are_refused(self, tmp_path, trained):
        policy = gated(trained())
        policy.save(tmp_path)
        card = tmp_path / "gated/gate.json"
        content = json.loads(card.read_text())
        content["layers"]["transformer"][0] = "blocks.0.attn1.to_x"
        card.write_text(json.dumps(content))
        with pytest.raises(UserError, match="other layers"):
            load_gated(FAMILIES["wan"]()[0], tmp_path)


class TestExpertsOfAnotherModel:
    def test_other_layers(self, trained):
        with pytest.raises(UserError, match=r"algorithm.experts.VQ: .*is no LoRA of this model.*missing"):
            gated(trained("ltx"), "wan")

    def test_missing_second_denoiser(self, trained):
        with pytest.raises(UserError, match=r"transformer_2/pytorch_lora_weights.safetensors is missing"):
            gated(trained("wan"), "wan_two_experts")


def test_every_dimension_compares_the_pairs(tmp_path):
    rows = [
        {"id": "x", "prompt": "p", "a": {"video": "0.mp4"}, "b": {"video": "1.mp4"}, "labels": {"VQ": 1, "MQ": -1}},
        {"id": "y", "prompt": "p", "a": {"video": "0.mp4"}, "b": {"video": "1.mp4"}, "labels": {"VQ": 0, "MQ": 1}},
    ]
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).touch()
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")

    class Recipe:
        algorithm = tlpo.Config(dimensions=["VQ", "MQ"])

    found = tlpo.chosen(Recipe, read_preferences(path), "here")
    assert [(c.pair.id, c.pair.a.video.name) for c in found] == [("x", "0.mp4"), ("x", "1.mp4"), ("y", "0.mp4")]


@pytest.fixture
def tlpo_recipe(recipe, trained):
    """Of a gate over two experts that fit its model."""
    experts = {name: str(folder) for name, folder in trained().items()}
    recipe["algorithm"] = {"name": "tlpo", "prompts_per_iteration": 2, "group_size": 2, "updates_per_rollout": 1}
    recipe["algorithm"] |= {"experts": experts, "width": 8}
    recipe["sampler"] = {"steps": 3, "kernel": "ode", "shared_noise": False}
    recipe["ema"] = {"decay": 0.9}
    return recipe


@pytest.fixture
def stages(tlpo_recipe, command, tmp_path):
    """Both experts made by the command, which is then that of the second stage."""
    second = tlpo_recipe["algorithm"]
    tlpo_recipe["algorithm"] = {k: v for k, v in second.items() if k not in ("experts", "width")} | {"name": "flow_dpo"}
    rewards = ("bright", "contrast")
    for name in rewards:
        weights = [f"rewards.{other}.weight={float(other == name)}" for other in rewards]
        outcome = command(*weights, f"output={tmp_path / name}", "optimizer.lr=0.1", "iterations=1")
        assert (outcome.code, outcome.err) == (0, "")
    tlpo_recipe["algorithm"] = {**second, "experts": {name: str(tmp_path / name) for name in rewards}}
    return command


class TestCommand:
    def test_run_and_resume(self, stages, tmp_path):
        alone = stages(f"output={tmp_path / 'alone'}")
        assert (alone.code, alone.err) == (0, "")
        rows = read_metrics(alone.folder / "metrics.jsonl")
        assert rows[0]["gate/bright"] + rows[0]["gate/contrast"] == pytest.approx(1, abs=1e-6)
        assert rows[0]["implicit_accuracy"] == 0.5
        assert rows[1]["gate/spread"] > 0
        assert rows[1]["drift/weights"] > 0
        for name in ("gated/gate.safetensors", "gated/experts/bright/pytorch_lora_weights.safetensors", "report.html"):
            assert (alone.folder / name).stat().st_size > 0
        assert (alone.folder / "lora/pytorch_lora_weights.safetensors").stat().st_size > 0
        state = load_state(checkpoints(alone.folder / "checkpoints")[-1])
        assert {name.partition(".")[2] for name in state.trained} >= {"layers", "out.weight", "hidden.bias"}
        saved = load_file(alone.folder / "gated/gate.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in state.ema.items())
        stopped = stages("rewards.bright.options.trouble=SIGINT", "rewards.bright.options.at=2")
        assert stopped.code == 1
        assert stages("--resume").code == 0
        for name in ("gated/gate.safetensors", "lora/pytorch_lora_weights.safetensors"):
            one, two = load_file(alone.folder / name), load_file(tmp_path / "run" / name)
            assert all(torch.equal(one[key], two[key]) for key in one)

    def test_check_counts_the_gate(self, tlpo_recipe, command):
        outcome = command("--check")
        # 2 blocks with 2 attentions of 4 targets: 16 embeddings, then (16 to 8) and (8 to 2)
        assert (outcome.code, outcome.err) == (0, "")
        assert f"trained parameters {16 * 8 + 16 * 8 + 8 + 8 * 2 + 2} on 16 layers" in outcome.out

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (["algorithm.experts.VQ=nowhere"], "algorithm.experts.VQ: no such folder: nowhere"),
            (["algorithm.experts.VQ=."], "pytorch_lora_weights.safetensors is missing"),
            (["algorithm.experts.b-d=."], "'b-d' is no name"),
            (["model.trained=full"], "leave it at lora"),
            (["algorithm.width=3"], "algorithm.width: 3"),
            (["algorithm.dimensions=[VQ]"], "name data.preferences"),
        ],
    )
    def test_bad_input(self, change, said, tlpo_recipe, command):
        for extra in ([], ["--check"]):
            outcome = command(*change, *extra)
            assert outcome.code == 2
            assert said in outcome.only_line()

    def test_check_of_two_denoisers(self, tlpo_recipe, command, trained, tmp_path):
        FAMILIES["wan_two_experts"]()[0].save_pretrained(tmp_path / "two")
        experts = trained("wan_two_experts")
        outcome = command(
            f"model.path={tmp_path / 'two'}", *(f"algorithm.experts.{n}={experts[n]}" for n in SIZES), "--check"
        )
        assert (outcome.code, outcome.err) == (0, "")
        assert "on 32 layers" in outcome.out

    def test_one_expert(self, tlpo_recipe, command):
        del tlpo_recipe["algorithm"]["experts"]["VQ"]
        outcome = command("--check")
        assert outcome.code == 2
        assert "algorithm.experts: a gate needs two or more to choose from, not 1" in outcome.only_line()

    def test_expert_of_another_model(self, tlpo_recipe, command, trained):
        outcome = command(f"algorithm.experts.VQ={trained('ltx')['VQ']}", "--check")
        assert outcome.code == 2
        assert "is no LoRA of this model" in outcome.only_line()

    def test_damaged_expert(self, tlpo_recipe, command, tmp_path, trained):
        name = "pytorch_lora_weights.safetensors"
        (tmp_path / name).write_bytes((trained()["VQ"] / "lora" / name).read_bytes()[:100])
        outcome = command(f"algorithm.experts.VQ={tmp_path}", "--check")
        assert outcome.code == 2
        assert "is damaged" in outcome.only_line()
