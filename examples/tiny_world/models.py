"""The parts of the tiny WanPipeline besides its VAE: transformer, text encoder, tokenizer, scheduler."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from . import world

TEXT_DIM = 64
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def transformer() -> WanTransformer3DModel:
    """1.16M parameters, 80 tokens a clip."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=5,
        rope_max_seq_len=32,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def text_encoder() -> UMT5EncoderModel:
    """84k parameters, two layers."""
    config = UMT5Config(
        vocab_size=len(tokenizer()),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and an end token as T5 has."""
    words = [PAD, END, UNKNOWN, *world.vocabulary()]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def scheduler() -> UniPCMultistepScheduler:
    """As Wan ships it."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a folder that DiffusionPipeline.from_pretrained loads. The weights are stored in `dtype`."""
    vae, transformer, text_encoder = (copy.deepcopy(m).cpu().to(dtype) for m in (vae, transformer, text_encoder))
    vae.register_to_config(_name_or_path="")
    WanPipeline(tokenizer(), text_encoder, vae, scheduler(), transformer).save_pretrained(folder)
    save_tokenizer(Path(folder) / "tokenizer")
    index = Path(folder) / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", TOKENIZER_CLASS))


def save_tokenizer(folder: Path) -> None:
    """Save under the class name that every version of transformers knows; 5.x writes a name of its own."""
    tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", TOKENIZER_CLASS))
