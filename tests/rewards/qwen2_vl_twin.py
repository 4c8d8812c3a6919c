"""A tiny Qwen2-VL reward model in the released formats, made with peft and transformers as the authors make theirs.

What it says of a clip is computed here too, without any of our code: the processor of transformers prepares the frames,
LoRA stays unmerged, and the hidden states come from embeddings with positions 0, 1, 2, ... in all three sections.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT += ["<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type in ('video', 'image') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD_TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
TEMPLATE = (
    "\nRate it.  \nVisual: <|VQ_reward|>\nEND\nMotion: <|MQ_reward|>\nEND\nPrompt - {text_prompt}\n<|TA_reward|>\nEND\n"
)
HPSV3_TEMPLATE = "\nRate the image.\nPrompt - {text_prompt}\n\n\n\nOverall: <|Reward|>\n\nEND\n"
SIZES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
NORM = {"VQ_mean": 0.1, "VQ_std": 2.0, "MQ_mean": -0.2, "MQ_std": 0.5, "TA_mean": 0.3, "TA_std": 1.5}


def tokenizer():
    """Bytes, and the special tokens of Qwen2-VL that are used here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CHAT])
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def processor():
    image = Qwen2VLImageProcessor(min_pixels=8 * 8, max_pixels=1 << 20, **SIZES)
    video = Qwen2VLVideoProcessor(size={"shortest_edge": 8 * 8, "longest_edge": 1 << 20}, **SIZES)
    return Qwen2VLProcessor(image, tokenizer(), video, chat_template=CHAT_TEMPLATE)


def config(tied=True):
    ids = tokenizer()
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(ids) + 20,  # longer than the tokenizer, as the published one is
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": ids.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": SIZES["patch_size"],
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=ids.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=ids.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=ids.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=ids.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


class Twin:
    """A model like Qwen2VLRewardModelBT under peft, and its processor."""

    def __init__(self, tokens, make_head, lora=True, tied=True, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = make_head(32)
            self.processor, self.tied = processor(), tied
            self.base = Qwen2VLForConditionalGeneration(config(tied))
            for parameter in self.base.parameters():  # so that clips and prompts differ clearly
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.25)
            self.processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
            self.ids = self.processor.tokenizer.convert_tokens_to_ids(tokens)
            self.base_state = {name: tensor.clone() for name, tensor in self.base.state_dict().items()}
            self.base.resize_token_embeddings(len(self.processor.tokenizer))
            nn.init.normal_(self.base.get_input_embeddings().weight, std=0.5)
            self.base.tie_weights()
            self.base.rm_head = head
            self.model = self.base
            if lora:
                names = [n for n, m in self.base.named_modules() if isinstance(m, nn.Linear)]
                targets = [n for n in names if not any(word in n for word in ("lm_head", "rm_head", "visual"))]
                self.model = get_peft_model(self.base, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        nn.init.normal_(parameter, std=0.1)
            self.model.eval()

    def inputs(self, kind, frames, texts):
        """Chats and pixels as the processor makes them. frames: float tensors (T, 3, H, W) in [0, 255]."""
        chats = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for text in texts
        ]
        media = {"videos": frames} if kind == "video" else {"images": [f[0].byte() for f in frames]}
        settings = {"do_resize": False} | ({"do_sample_frames": False} if kind == "video" else {})
        return self.processor(text=chats, padding=True, return_tensors="pt", **media, **settings)

    @torch.no_grad()
    def logits(self, kind, frames, texts, positions="row"):
        """(B, K, outputs) at the special tokens. positions "natural": as transformers runs Qwen2-VL by itself."""
        batch = self.inputs(kind, frames, texts)
        core = self.base.model
        if positions == "natural":
            hidden = core(**batch).last_hidden_state
        else:
            embeds = core.get_input_embeddings()(batch.input_ids)
            pixels, grid, token = {
                "video": ("pixel_values_videos", "video_grid_thw", self.base.config.video_token_id),
                "image": ("pixel_values", "image_grid_thw", self.base.config.image_token_id),
            }[kind]
            features = core.visual(batch[pixels], grid_thw=batch[grid]).pooler_output
            embeds[batch.input_ids == token] = features
            rows = torch.arange(batch.input_ids.shape[1]).expand(3, len(texts), -1)
            hidden = core.language_model(
                inputs_embeds=embeds, attention_mask=batch.attention_mask, position_ids=rows
            ).last_hidden_state
        at = torch.isin(batch.input_ids, torch.tensor(self.ids))
        return self.base.rm_head(hidden)[at].view(len(texts), len(self.ids), -1)

    def released_state(self):
        """Weights under the names of transformers 4.45."""

        def old(name):
            name = name.replace("model.visual.", "visual.", 1) if "model.visual." in name else name
            return name.replace("model.language_model.", "model.", 1)

        return {old(name): tensor.clone() for name, tensor in self.model.state_dict().items()}


def save_base(folder, twin, weights=True):
    """The Qwen2-VL that was tuned, as a hub repository holds it."""
    twin.processor.save_pretrained(folder)
    base = processor()
    base.tokenizer.save_pretrained(folder)  # without the reward's tokens
    config(twin.tied).save_pretrained(folder)
    if weights:
        save_file(
            {name: t for name, t in twin.base_state.items() if name != "lm_head.weight"}, folder / "model.safetensors"
        )


def model_config(**changes):
    return {
        "data_config": {
            "max_frame_pixels": 32 * 40,
            "min_frame_pixels": 16 * 16,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "test_special",
            "sample_type": "uniform",
            **changes,
        },
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": 1,
            "use_special_tokens": True,
        },
        "peft_lora_config": {"lora_enable": True, "lora_r": 3, "lora_alpha": 6, "use_rslora": False},
        "inference_config": NORM,
    }


def save_video_reward(folder, twin, layout="model.pth", output_dim=1, **changes):
    """A folder in the layout of VideoReward's release."""
    folder.mkdir(parents=True, exist_ok=True)
    content = model_config(**changes)
    content["model_config"]["output_dim"] = output_dim
    (folder / "model_config.json").write_text(json.dumps(content))
    (folder / "prompt_template.txt").write_text(TEMPLATE)
    save_base(folder / "base", twin)
    step = folder / "checkpoint-12"
    step.mkdir()
    state = twin.released_state()
    if layout == "model.pth":
        torch.save(state, step / "model.pth")
    else:
        adapter = {n.replace(".default.", "."): t for n, t in state.items() if "lora_" in n}
        save_file(adapter, step / "adapter_model.safetensors")
        trained = ("rm_head", "embed_tokens", "lm_head")  # the rest comes from the base
        rest = {n: t for n, t in state.items() if "lora_" not in n and any(word in n for word in trained)}
        torch.save(rest, step / "non_lora_state_dict.pth")
    return folder


class Saved(NamedTuple):
    """A twin, and the folder in which it lies in the released format."""

    twin: Twin
    folder: Path


def linear(outputs):
    """VideoReward's head."""
    return lambda hidden: nn.Linear(hidden, outputs, bias=False)


def ranknet(hidden):
    """HPSv3's head."""
    layers = [nn.Linear(hidden, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*layers)


def save_hpsv3(folder, twin):
    """A folder as HPSv3 is released, its base beside it."""
    save_base(folder / "base", twin, weights=False)
    save_file({name: t.contiguous() for name, t in twin.released_state().items()}, folder / "HPSv3.safetensors")
    (folder / "prompt_template.txt").write_text(HPSV3_TEMPLATE)
    return folder


def smart_size(height, width, low, high, factor=8):
    """Qwen2-VL's rule, written out once more."""
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > high:
        beta = math.sqrt(height * width / high)
        return math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    if h * w < low:
        beta = math.sqrt(low / (height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return h, w
