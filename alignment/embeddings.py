"""Prompt embeddings, computed once a prompt.

What `encode_prompt` returns differs from pipeline to pipeline (masks, pooled vectors, position ids), so the cache wraps
that method itself and knows nothing about its results but which of them have a row for each prompt. One file a prompt,
keyed by content, encoders and settings, memory-mapped.

Each prompt is encoded on its own, so that its embedding does not depend on its batch. Images that go with prompts, one
each, are part of the key by their pixels. Left to the pipeline are calls that a key cannot describe (an image for all,
tensors) and batches of prompts whose embeddings differ in length.
"""

from __future__ import annotations

import hashlib
import inspect
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fingerprints import sampled_weights


class Entry(NamedTuple):
    """What encode_prompt returned."""

    tensors: tuple[Tensor | None, ...]
    rows: tuple[bool, ...]  # which of them have a row for each prompt
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
        self.settings: dict[str, dict[str, Any]] = {}  # the settings that the pipeline has asked for so far
        self.rows: dict[str, tuple[bool, ...]] = {}  # settings -> which results have a row for each prompt
        self.cacheable = True
        self.with_images = False  # some embeddings depend on an image, too
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
        if prompts is None:
            return self._run(args, kwargs)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        lists = {k: v for k, v in call.items() if ("prompt" in k or _is_images(v)) and _is_list(v, len(prompts))}
        shared = {k: v for k, v in call.items() if k not in lists}
        texts = {k: v for k, v in lists.items() if not _is_images(v)}
        self.with_images |= len(texts) < len(lists)
        self.cacheable &= _is_plain({k: v for k, v in (shared | texts).items() if k != "device"})
        if not self.cacheable:
            return self._run(args, kwargs)
        self.settings[_named(shared)] = shared
        rows = [{**{k: v[i] for k, v in lists.items()}, "prompt": prompts[i]} for i in range(len(prompts))]
        try:
            found = {key: self._entry(row, shared) for key, row in {_named(row): row for row in rows}.items()}
        except NotTensorsError:
            self.cacheable = False
            return self._run(args, kwargs)
        entries = [found[_named(row)] for row in rows]
        if not _same_shapes(entries):
            return self._run(args, kwargs)
        device = torch.device(shared.get("device") or self.pipe._execution_device)
        columns = zip(entries[0].rows, zip(*(entry.tensors for entry in entries), strict=True), strict=True)
        stacked = [torch.cat(column) if has_rows else column[0] for has_rows, column in columns]
        stacked = tuple(None if t is None else t.to(device) for t in stacked)
        return stacked[0] if entries[0].single else stacked

    def hold(self, prompts: Sequence[str]) -> bool:
        """Embed these prompts under every setting that the pipeline has asked for so far (it has to have run once).

        Returns: whether any batch of them can now be served without the encoders.
        """
        if not self.cacheable or self.with_images or not self.settings:
            return False
        every = [
            [self._entry({"prompt": prompt}, shared) for prompt in dict.fromkeys(prompts)]
            for shared in self.settings.values()
        ]
        return all(_same_shapes(entries) for entries in every)

    def release_encoders(self) -> None:
        """Drop the text encoders from the pipeline and from memory."""
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self.original = None

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.original is None:
            raise RuntimeError(f"the text encoders were dropped before this was embedded: {kwargs.get('prompt')!r}")
        return self.original(*args, **kwargs)

    def _entry(self, row: dict[str, Any], shared: dict[str, Any]) -> Entry:
        """The results for one prompt, from disk or from the encoders."""
        content = repr((self.encoders, _named(shared), _named(row)))
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:40]}.safetensors"
        entry = _read(path)
        if entry is None:
            result = self._encode([row], shared)
            tensors = (result,) if isinstance(result, Tensor) else result
            _write(path, Entry(tensors, self._with_rows(row, tensors, shared), isinstance(result, Tensor)))
            entry = _read(path)
        return entry

    def _encode(self, rows: list[dict[str, Any]], shared: dict[str, Any]) -> Any:
        result = self._run((), {**shared, **{name: [row[name] for row in rows] for name in rows[0]}})
        several = isinstance(result, tuple) and all(t is None or isinstance(t, Tensor) for t in result)
        if not several and not isinstance(result, Tensor):
            raise NotTensorsError
        return result

    def _with_rows(self, row: dict[str, Any], one: tuple, shared: dict[str, Any]) -> tuple[bool, ...]:
        """Which results have a row for each prompt: encode one prompt twice and compare. Once for all prompts."""
        settings = _named(shared)
        if settings not in self.rows:
            two = self._encode([row, row], shared)
            pairs = zip(one, (two,) if isinstance(two, Tensor) else two, strict=True)
            self.rows[settings] = tuple(a is not None and a.shape[:1] != b.shape[:1] for a, b in pairs)
        return self.rows[settings]


def _is_plain(value: Any) -> bool:
    """Whether repr tells all: true of numbers and texts, not of images."""
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_images(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Image.Image) for v in value)


def _named(values: dict[str, Any]) -> str:
    """The values in words; of an image its size and a digest of its pixels."""

    def described(value: Any) -> Any:
        if isinstance(value, Image.Image):
            return (value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest())
        return value

    return repr(sorted((name, described(value)) for name, value in values.items() if name != "device"))


def _same_shapes(entries: list[Entry]) -> bool:
    """Whether these prompts' embeddings can be put together."""
    shapes = {tuple(None if t is None else t.shape for t in entry.tensors) for entry in entries}
    return len(shapes) == 1


def _fingerprint(pipe: Any) -> str:
    """A digest of text encoders' weights (sampled), tokenizers' vocabularies, image processors and code versions."""
    versions = (type(pipe).__name__, diffusers.__version__, transformers.__version__)
    digest = hashlib.sha256(repr(versions).encode())
    for name, part in sorted(pipe.components.items()):
        if name.startswith("text_encoder") and part is not None:
            for sample in sampled_weights(part):
                digest.update(sample)
        elif name.startswith("tokenizer") and part is not None:
            digest.update(repr((sorted(part.get_vocab().items()), getattr(part, "model_max_length", None))).encode())
        elif name.endswith("processor") and hasattr(part, "to_json_string"):
            digest.update(part.to_json_string().encode())
    return digest.hexdigest()


def _write(path: Path, entry: Entry) -> None:
    tensors = {f"{i:02d}": t.detach().contiguous().cpu().clone() for i, t in enumerate(entry.tensors) if t is not None}
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # a name of its own: processes may write the same entry
    rows = "".join(str(int(has_rows)) for has_rows in entry.rows)
    save_file(tensors, temporary, metadata={"rows": rows, "single": str(entry.single)})
    temporary.replace(path)


def _read(path: Path) -> Entry | None:
    """The entry, memory-mapped; None where there is none or a crash of the machine damaged it."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            meta, keys = file.metadata(), set(file.keys())
            rows = tuple(character == "1" for character in meta["rows"])
            names = [f"{i:02d}" for i in range(len(rows))]
            tensors = tuple(file.get_tensor(n) if n in keys else None for n in names)
            return Entry(tensors, rows, meta["single"] == "True")
    except SafetensorError:
        return None
