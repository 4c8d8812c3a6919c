"""Prompt embeddings, computed once a prompt.

What `encode_prompt` returns differs from pipeline to pipeline (masks, pooled vectors, position ids), so the cache wraps
that method itself and knows nothing about its results but which of them have a row for each prompt. One file a prompt,
keyed by content, encoders and settings, memory-mapped.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Entry(NamedTuple):
    """What encode_prompt returned."""

    tensors: tuple[Tensor | None, ...]
    single: bool  # returned bare, not as a tuple


class NotTensorsError(TypeError):
    """encode_prompt returned something other than tensors: it cannot be cached."""


class EmbeddingCache:
    """A cached `encode_prompt`. Put one on a pipeline with `install`."""

    def __init__(self, pipe: Any, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.original: Callable[..., Any] | None = pipe.encode_prompt
        self.signature = inspect.signature(pipe.encode_prompt)
        self.encoders = _fingerprint(pipe)
        self.memory: dict[str, Entry] = {}
        self.settings: dict[str, dict[str, Any]] = {}  # the settings that the pipeline has asked for so far
        self.cacheable = True
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def install(cls, pipe: Any, folder: Path) -> EmbeddingCache | None:
        """Wrap the pipeline's encode_prompt; None where it has none."""
        if not hasattr(pipe, "encode_prompt"):
            return None
        pipe.encode_prompt = cache = cls(pipe, folder)
        return cache

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(self.signature.bind(*args, **kwargs).arguments)
        prompts = call.pop("prompt", None)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        given = any(isinstance(value, Tensor) for value in call.values())
        if not self.cacheable or prompts is None or given:
            return self._run(args, kwargs)
        lists = {k: v for k, v in call.items() if isinstance(v, list) and len(v) == len(prompts)}
        shared = {k: v for k, v in call.items() if k not in lists}
        self.settings.setdefault(str({**shared, "device": None}), shared)
        rows = [{**{k: v[i] for k, v in lists.items()}, "prompt": prompts[i]} for i in range(len(prompts))]
        try:
            entry = self._stack(rows, shared)
        except NotTensorsError:
            self.cacheable = False
            return self._run(args, kwargs)
        return entry.tensors[0] if entry.single else entry.tensors

    def embed(self, prompts: Sequence[str]) -> None:
        """Embed these prompts under every setting that the pipeline has asked for so far (call it once before)."""
        for shared in list(self.settings.values()):
            for prompt in dict.fromkeys(prompts):
                self._entry([{"prompt": prompt}], shared)
            self._layout({"prompt": prompts[0]}, shared)

    def release_encoders(self) -> None:
        """Drop the text encoders from the pipeline and from memory; every prompt has to be embedded by now."""
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self.original = None

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.original is None:
            raise RuntimeError(f"the text encoders were dropped before this was embedded: {kwargs.get('prompt')!r}")
        return self.original(*args, **kwargs)

    def _stack(self, rows: list[dict[str, Any]], shared: dict[str, Any]) -> Entry:
        """One entry for the whole batch. Prompts of unequal length are encoded together, as the pipeline would."""
        entries = [self._entry([row], shared) for row in rows]
        if len(entries) == 1:
            return entries[0]
        grows = self._layout(rows[0], shared)
        columns = list(zip(*(entry.tensors for entry in entries), strict=True))
        if any(g and len({t.shape[1:] for t in column}) > 1 for column, g in zip(columns, grows, strict=True)):
            return self._entry(rows, shared)
        stacked = (torch.cat(column) if g else column[0] for column, g in zip(columns, grows, strict=True))
        return Entry(tuple(stacked), entries[0].single)

    def _layout(self, row: dict[str, Any], shared: dict[str, Any]) -> list[bool]:
        """Which results have a row for each prompt: encode one prompt once and twice, and compare."""
        one, two = self._entry([row], shared), self._entry([row, row], shared)
        pairs = zip(one.tensors, two.tensors, strict=True)
        return [a is not None and a.shape[:1] != b.shape[:1] for a, b in pairs]

    def _entry(self, rows: list[dict[str, Any]], shared: dict[str, Any]) -> Entry:
        """The results for these rows, from memory, from disk or from the encoders."""
        key = self._key(rows, shared)
        if key not in self.memory:
            path = self.folder / f"{key}.safetensors"
            if not path.exists():
                lists = {name: [row[name] for row in rows] for name in rows[0]}
                result = self._run((), {**shared, **lists})
                single = isinstance(result, Tensor)
                result = (result,) if single else result
                if not isinstance(result, tuple) or not all(t is None or isinstance(t, Tensor) for t in result):
                    raise NotTensorsError
                _write(path, Entry(result, single))
            entry = _read(path)
            device = torch.device(shared.get("device") or self.pipe._execution_device)
            self.memory[key] = Entry(tuple(None if t is None else t.to(device) for t in entry.tensors), entry.single)
        return self.memory[key]

    def _key(self, rows: list[dict[str, Any]], shared: dict[str, Any]) -> str:
        settings = sorted((k, str(v)) for k, v in shared.items() if k != "device")
        content = repr((self.encoders, settings, [sorted(row.items()) for row in rows]))
        return hashlib.sha256(content.encode()).hexdigest()[:40]


def _fingerprint(pipe: Any) -> str:
    """A digest of the text encoders' weights (sampled) and of the tokenizers' vocabularies."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, part in sorted(pipe.components.items()):
        if name.startswith("text_encoder") and part is not None:
            for key, tensor in part.state_dict().items():
                flat = tensor.detach().flatten()
                sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
                digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.tobytes())
        elif name.startswith("tokenizer") and part is not None:
            digest.update(repr((sorted(part.get_vocab().items()), getattr(part, "model_max_length", None))).encode())
    return digest.hexdigest()


def _write(path: Path, entry: Entry) -> None:
    tensors = {f"{i:02d}": t.detach().contiguous().cpu().clone() for i, t in enumerate(entry.tensors) if t is not None}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"count": str(len(entry.tensors)), "single": str(entry.single)})
    temporary.replace(path)


def _read(path: Path) -> Entry:
    with safe_open(path, "pt") as file:
        meta, keys = file.metadata(), set(file.keys())
        names = [f"{i:02d}" for i in range(int(meta["count"]))]
        return Entry(tuple(file.get_tensor(n) if n in keys else None for n in names), meta["single"] == "True")
