"""LoRA experts fused by a gate: on a plain diffusers pipeline (`load_gated`), and as a policy that trains the gate.

What a run writes, beside what every run does:

    gated/gate.safetensors    the gate's weights
    gated/gate.json           names of the experts, width of the gate, the layers that it weighs
    gated/experts/<name>/     their LoRAs, so that the folder can be taken elsewhere
    lora/                     one ordinary LoRA for tools that know no gate: the experts by the mean of their weights
                              over the timesteps of sampling, layer by layer
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import Prompt, conditions
from .errors import UserError, one_line
from .files import replacing_folder
from .gates import Gate, adapted_layers, add_gate, watch_timesteps
from .lora import LAYERS, load_lora, lora_files, write_lora
from .policy import Policy, denoisers_of

FOLDER, WEIGHTS, CARD = "gated", "gate.safetensors", "gate.json"
Shapes = Mapping[str, Sequence[int]]  # layer -> shape of its weight


class GatedPolicy(Policy):
    """A policy that trains a gate over LoRA experts, which are frozen; the reference is the gate at its start.

    Attributes:
        gates: denoiser's name -> its gate.
        timesteps: the same -> (T,) that it sees in sampling, once `find_timesteps` has looked; none where that does not
            call it.
    """

    def __init__(self, *policy: Any, experts: Mapping[str, str | Path], width: int):
        """As `Policy`, with the experts' folders by name and the width of the gate."""
        self.experts = {name: expert_folder(path) for name, path in experts.items()}
        self.width = width
        super().__init__(*policy)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.timesteps: dict[str, Tensor] = {}

    def _make_trainable(self) -> dict[str, nn.Parameter]:
        self.gates = add_experts(self.pipe, self.denoisers, self.experts, self.width)
        for denoiser in self.denoisers.values():
            for name, p in denoiser.named_parameters():
                if "lora_" in name:
                    p.data = p.data.float()  # as they were trained
        named = [(f"{c}.{name}", p) for c, gate in self.gates.items() for name, p in gate.named_parameters()]
        return {name: p.requires_grad_(True) for name, p in named}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """All experts in equal parts, without gradients."""
        with torch.no_grad(), self.using(self.start):
            yield

    def find_timesteps(self, prompt: Prompt, steps: int | None) -> None:
        """Sample once, as evaluations do, to see at which timesteps each denoiser is called."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.denoisers}

        def note(name: str, timesteps: Tensor) -> None:
            seen[name].append(timesteps[:1].float().cpu())

        handles = [watch_timesteps(denoiser, partial(note, name)) for name, denoiser in self.denoisers.items()]
        self.generate([prompt.text], [0], steps, output_type="latent", **conditions([prompt]))
        for handle in handles:
            handle.remove()
        self.timesteps = {name: torch.cat(found).unique() for name, found in seen.items() if found}

    @torch.no_grad()
    def shares(self) -> dict[str, Tensor]:
        """Denoiser's name -> (T, L, K) weights in sampling, of those denoisers that it calls."""
        return {name: self.gates[name](timesteps) for name, timesteps in self.timesteps.items()}

    def save(self, folder: Path) -> Path:
        """Write `gated/` for `load_gated`; and `lora/`, the gate's mean over timesteps, for load_lora_weights."""
        with replacing_folder(folder / FOLDER) as new:
            self._save_gated(new)
        shares = self.shares()
        with replacing_folder(folder / "lora") as new:
            adapters = {
                name: averaged_lora(denoiser, list(self.experts), shares[name].mean(0) if name in shares else None)
                for name, denoiser in self.denoisers.items()
            }
            write_lora(self.pipe, adapters, new)
        return folder / FOLDER

    def _save_gated(self, folder: Path) -> None:
        names = list(self.experts)
        save_file({name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}, folder / WEIGHTS)
        layers = {name: list(adapted_layers(denoiser, names)) for name, denoiser in self.denoisers.items()}
        card = {"experts": names, "width": self.width, "layers": layers}
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", "utf-8")
        for name, source in self.experts.items():
            for file, _ in lora_files(type(self.pipe), self.denoisers, source).values():
                target = folder / "experts" / name / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def load_gated(pipe: Any, folder: str | Path) -> None:
    """Put the experts and the gate of a run on a diffusers pipeline.

    Args:
        folder: of the run, or its `gated/`.
    Raises: UserError where the files are not there, or do not fit the pipeline.
    """
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not (folder / CARD).is_file():
        raise UserError(f"{folder}: holds no {CARD}; name the folder of a run of tlpo, or its {FOLDER}/")
    card = json.loads((folder / CARD).read_text("utf-8"))
    denoisers = denoisers_of(pipe)
    gates = add_experts(pipe, denoisers, {name: folder / "experts" / name for name in card["experts"]}, card["width"])
    layers = {name: list(adapted_layers(denoiser, card["experts"])) for name, denoiser in denoisers.items()}
    if layers != card["layers"]:
        raise UserError(f"{folder}: the experts adapt other layers than the gate was trained on")
    weights = load_file(folder / WEIGHTS)
    for name, gate in gates.items():
        gate.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
        gate.requires_grad_(False)


def add_experts(
    pipe: Any, denoisers: Mapping[str, nn.Module], experts: Mapping[str, Path], width: int
) -> dict[str, Gate]:
    """Put LoRAs on the denoisers, frozen and all of them active, each weighed by the gate of its denoiser.

    Raises: UserError where a LoRA does not fit.
    """
    shapes = {
        name: {n: m.weight.shape for n, m in denoiser.named_modules() if isinstance(m, LAYERS)}
        for name, denoiser in denoisers.items()
    }
    for expert, folder in experts.items():
        check_expert(type(pipe), expert, folder, shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for expert, folder in experts.items():
            load_lora(pipe, denoisers, folder, expert)
    gates = {}
    for name, denoiser in denoisers.items():
        denoiser.set_adapter(list(experts))
        denoiser.requires_grad_(False).eval()
        gates[name] = add_gate(denoiser, list(experts), width)
    return gates


def expert_folder(path: str | Path) -> Path:
    """The LoRA's folder: that of a run, or the one named."""
    path = Path(path).expanduser()
    return path / "lora" if (path / "lora").is_dir() else path


def check_expert(pipeline: type, expert: str, folder: Path, shapes: Mapping[str, Shapes]) -> dict[str, Shapes]:
    """The shapes of a LoRA's weights, by denoiser and name.

    Args:
        shapes: of the weights of each denoiser's layers.
    Raises: UserError where the LoRA does not fit these layers.
    """
    key, found = f"algorithm.experts.{expert}", {}
    for component, (file, prefix) in lora_files(pipeline, shapes, folder).items():
        if not file.is_file():
            raise UserError(f"{key}: {file} is missing; name the folder of a finished run, or of a LoRA")
        found[component] = {name.removeprefix(prefix): shape for name, shape in shapes_in(file, key).items()}
        for name, shape in found[component].items():
            layer, end = name.rpartition(".lora_")[::2]
            weight = shapes[component].get(layer)
            fits = weight and {"A.weight": shape[1:] == list(weight[1:]), "B.weight": shape[0] == weight[0]}.get(end)
            if not fits:
                there = f"of size {list(weight)}" if weight else "missing"
                raise UserError(
                    f"{key}: {file} is no LoRA of this model: it holds {name} of size {shape}, and in {component} that "
                    f"layer is {there}"
                )
    return found


def shapes_in(file: Path, key: str) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name. Raises: UserError that begins with `key` where the file is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {file} is damaged ({one_line(error)}); save the LoRA again") from error


def count_gates(experts: Sequence[Mapping[str, Shapes]], width: int) -> tuple[int, int, int]:
    """Numbers of weights in the gates and in the experts, and of the layers that the gates weigh.

    Args:
        experts: of each the shapes of its weights, as `check_expert` gives them.
    """
    gates = layers = 0
    for component in experts[0]:
        adapted = {name.rpartition(".lora_")[0] for shapes in experts for name in shapes[component]}
        layers += len(adapted)
        gates += sum(p.numel() for p in Gate(len(adapted), len(experts), width).parameters())
    frozen = sum(math.prod(shape) for shapes in experts for part in shapes.values() for shape in part.values())
    return gates, frozen, layers


def averaged_lora(
    denoiser: nn.Module, experts: Sequence[str], shares: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One LoRA that is a fixed mixture of the experts, as weights and configuration: their ranks, side by side.

    Args:
        shares: (L, K) of the experts; None, where sampling does not call the denoiser: equal ones.
    """
    layers = adapted_layers(denoiser, experts)
    if shares is None:
        shares = torch.full((len(layers), len(experts)), 1 / len(experts))
    weights: dict[str, Tensor] = {}
    for (name, layer), row in zip(layers.items(), shares.tolist(), strict=True):
        parts = [(e, share * layer.scaling[e]) for e, share in zip(experts, row, strict=True) if e in layer.lora_A]
        weights[f"{name}.lora_A.weight"] = torch.cat([layer.lora_A[e].weight for e, _ in parts])
        weights[f"{name}.lora_B.weight"] = torch.cat([layer.lora_B[e].weight * scale for e, scale in parts], 1)
    rank = max(a.shape[0] for name, a in weights.items() if name.endswith("lora_A.weight"))
    for name, w in weights.items():  # one rank for all layers, and so one scale: 1
        dim = 0 if name.endswith("lora_A.weight") else 1
        missing = w.new_zeros((*w.shape[:dim], rank - w.shape[dim], *w.shape[dim + 1 :]))
        weights[name] = torch.cat([w.detach(), missing], dim).float().cpu().contiguous()
    return weights, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)).to_dict()
