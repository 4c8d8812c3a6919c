"""CLIP checkpoints in the form of transformers: config.json with model_type clip, a tokenizer, a preprocessor.

M images, N prompts, D embedding
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from rewards.checkpoints import LOAD_ERRORS, is_hub_id, read_json
from rewards.contract import RewardError, one_line
from rewards.encoders.encoder import Towers
from rewards.encoders.images import BICUBIC, BILINEAR, pad, resize_as_pil, shortest_shape

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
FILTERS = {2: BILINEAR, 3: BICUBIC}


class TransformersSource(NamedTuple):
    """A CLIPModel of transformers, and the tokenizer and preprocessor that belong to it."""

    path: str  # a folder or a hub id
    processor: str  # the same

    @classmethod
    def find(cls, name: str, path: str, processor: str | None = None) -> TransformersSource:
        """Look whether the files are there; a hub id, owner/name, is asked only when it is loaded.

        Args: processor: where the tokenizer and the preprocessor are; None: beside the weights.
        Raises: RewardError, one line.
        """
        processor = processor or path
        folder = Path(path)
        for place in (path, processor):
            if not Path(place).is_dir() and not is_hub_id(place):
                raise RewardError(f"reward {name}: no folder {place}, and it is no hub id, owner/name")
        if folder.is_dir():
            kind = read_json(name, folder / "config.json").get("model_type")
            if kind != "clip":
                raise RewardError(f"reward {name}: {folder}/config.json has model_type {kind!r}, expected 'clip'")
            _check_one_of(name, folder, WEIGHTS)
        if Path(processor).is_dir():
            _check_one_of(name, Path(processor), PREPROCESSORS)
            _check_one_of(name, Path(processor), TOKENIZERS)
        return cls(path, processor)

    def load(self, name: str, precision: str, device: torch.device) -> Towers:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision.removeprefix("pure_"), torch.float32)
        try:
            with torch.random.fork_rng(devices=[]):
                model, report = CLIPModel.from_pretrained(
                    self.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
                )
            tokenizer = AutoTokenizer.from_pretrained(self.processor)
            preprocess = CLIPImageProcessor.from_pretrained(self.processor)
        except LOAD_ERRORS as error:
            reason = one_line(error) or type(error).__name__
            raise RewardError(
                f"reward {name}: cannot load {self.path} with the processor {self.processor}: {reason} (no folder "
                "here and none on the hub, or half-written: correct path, or copy it again)"
            ) from error
        wrong = [f"{kind} {sorted(map(str, keys))[0]}" for kind, keys in report.items() if keys]
        if wrong:  # transformers warns of these, and draws what is missing
            raise RewardError(
                f"reward {name}: {self.path} is not the model of its config.json: {', '.join(wrong)[:300]}"
            )
        if len(tokenizer) > model.config.text_config.vocab_size:
            raise RewardError(
                f"reward {name}: the tokenizer of {self.processor} knows more words than {self.path} does"
            )
        model.eval().requires_grad_(False).to(device)
        context = model.config.text_config.max_position_embeddings

        def encode_text(prompts: list[str]) -> Tensor:
            tokens = tokenizer(prompts, padding=True, truncation=True, max_length=context, return_tensors="pt")
            ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
            return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

        return Towers(
            model,
            lambda images: model.get_image_features(pixel_values=images).pooler_output,
            encode_text,
            partial(prepare, config=preprocess),
            _crop(name, preprocess, model.config.vision_config.image_size),
            preprocess.image_mean,
            preprocess.image_std,
        )


def prepare(images: Tensor, config: Any) -> Tensor:
    """Resize, crop and normalise (M, 3, H, W) images in [0, 1] as CLIPImageProcessorPil does, but for rounding."""
    if config.do_resize:
        shape, size = images.shape[-2:], config.size
        target = shortest_shape(shape, size.shortest_edge) if size.shortest_edge else (size.height, size.width)
        images = resize_as_pil(images, target, FILTERS[int(config.resample)])
    if config.do_center_crop:
        height, width = config.crop_size.height, config.crop_size.width
        images = pad(images, (height, width))
        top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], (height, width), strict=True))
        images = images[..., top : top + height, left : left + width]
    return TF.normalize(images, list(config.image_mean), list(config.image_std))


def _crop(name: str, config: Any, image_size: int) -> tuple[int, int]:
    """The size of prepared images. Raises: RewardError where the preparation is none that `prepare` knows."""
    crop = config.crop_size if config.do_center_crop else config.size
    known = (
        int(config.resample) in FILTERS
        and (config.size.shortest_edge or config.size.height)
        and (crop.height, crop.width) == (image_size, image_size)
        and config.do_normalize
        and config.do_rescale
        and abs(config.rescale_factor * 255 - 1) < 1e-6
    )
    if not known:
        raise RewardError(
            f"reward {name}: the preprocessor asks for another preparation of images than CLIP's: resizing (bicubic or "
            f"bilinear), crop to {image_size} x {image_size}, division by 255, normalisation"
        )
    return image_size, image_size


def _check_one_of(name: str, folder: Path, files: tuple[str, ...]) -> None:
    if not any((folder / file).is_file() for file in files):
        raise RewardError(f"reward {name}: none of {', '.join(files)} in {folder}; copy it there")
