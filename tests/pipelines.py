"""Tiny random pipelines of many families, built as users have them: real classes, real text encoders, real schedulers.

`FAMILIES[name]()` returns (pipe, call): a diffusers pipeline and arguments for it that make two short clips (B = 2).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

PROMPTS = ["a red circle moves left", "a blue square"]
STEPS = 5


def tokenizer(max_length: int = 32) -> transformers.PreTrainedTokenizerFast:
    """One token a character, so that no two prompts look alike."""
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=max_length, **names)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": 128, "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}


def t5(multilingual: bool = False, width: int = 16) -> Any:
    sizes = {"d_model": width, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 128}
    if multilingual:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


def clip(projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(**SIZES, max_position_embeddings=77, projection_dim=16)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def image_vae(latent_channels: int, **options: Any) -> diffusers.AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": latent_channels}
    return diffusers.AutoencoderKL(**blocks, **sizes, **options)


def clip_call(height: int = 16, width: int = 16, num_frames: int = 5, **more: Any) -> dict[str, Any]:
    size = {"height": height, "width": width, "num_frames": num_frames}
    return {"prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "pt", **size, **more}


def image_call(**more: Any) -> dict[str, Any]:
    call = clip_call(max_sequence_length=32, **more)
    del call["num_frames"]
    return call


def unipc(flow_shift: float) -> diffusers.UniPCMultistepScheduler:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": flow_shift}
    return diffusers.UniPCMultistepScheduler(**flow)


def euler(**options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


WAN_SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16}
WAN_SIZES |= {"num_layers": 2, "rope_max_seq_len": 32}


def wan_transformer(**options: Any) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**WAN_SIZES, **options)


def wan_parts(flow_shift: float = 3.0) -> dict[str, Any]:
    text = {"tokenizer": tokenizer(), "text_encoder": t5(multilingual=True)}
    return {**text, "vae": wan_vae(), "scheduler": unipc(flow_shift)}


def wan() -> tuple[Any, dict]:
    pipe = diffusers.WanPipeline(**wan_parts(), transformer=wan_transformer())
    return pipe, clip_call(guidance_scale=3.0, max_sequence_length=32)


def wan_two_experts() -> tuple[Any, dict]:
    experts = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    pipe = diffusers.WanPipeline(**wan_parts(), **experts, boundary_ratio=0.875)
    return pipe, clip_call(guidance_scale=3.0, guidance_scale_2=2.0, max_sequence_length=32)


def wan_image_to_video() -> tuple[Any, dict]:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    processor = transformers.CLIPImageProcessor(crop_size=16, size=16)
    transformer = wan_transformer(in_channels=36, image_dim=16, added_kv_proj_dim=24)
    parts = {"image_encoder": vision, "image_processor": processor, "transformer": transformer}
    pipe = diffusers.WanImageToVideoPipeline(**wan_parts(), **parts)
    # The image branch of attention takes whatever lies beyond 512 text tokens.
    return pipe, clip_call(image=torch.rand(1, 3, 16, 16), guidance_scale=3.0, max_sequence_length=512)


def skyreels_v2() -> tuple[Any, dict]:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**WAN_SIZES)
    pipe = diffusers.SkyReelsV2Pipeline(**wan_parts(flow_shift=8.0), transformer=transformer)
    return pipe, clip_call(guidance_scale=3.0, max_sequence_length=32)


def sana_video() -> tuple[Any, dict]:
    heads = {"num_attention_heads": 2, "num_cross_attention_heads": 2}
    heads |= {"attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
    transformer = diffusers.SanaVideoTransformer3DModel(
        **heads, num_layers=2, caption_channels=16, sample_size=2, rope_max_seq_len=32
    )
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0}
    text = {"tokenizer": tokenizer(), "text_encoder": transformers.Gemma2Model(config)}
    scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
    pipe = diffusers.SanaVideoPipeline(**text, vae=wan_vae(), scheduler=scheduler, transformer=transformer)
    call = clip_call(32, 32, guidance_scale=3.0, max_sequence_length=32, use_resolution_binning=False)
    return pipe, {"frames": call.pop("num_frames"), "complex_human_instruction": None, **call}


def hunyuan_video() -> tuple[Any, dict]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    blocks = {f"{way}_block_types": (f"HunyuanVideo{way.title()}Block3D",) * 4 for way in ("down", "up")}
    vae = diffusers.AutoencoderKLHunyuanVideo(
        **blocks, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    llama = transformers.LlamaModel(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 3}))
    text = {"text_encoder": llama, "text_encoder_2": clip(), "tokenizer": tokenizer(), "tokenizer_2": tokenizer(77)}
    pipe = diffusers.HunyuanVideoPipeline(**text, transformer=transformer, vae=vae, scheduler=euler(shift=7.0))
    template = {"template": "{}", "crop_start": 0}
    return pipe, clip_call(num_frames=5, max_sequence_length=32, prompt_template=template)


def ltx_parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    layers = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    widths = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    vae = diffusers.AutoencoderKLLTXVideo(latent_channels=8, **layers, **widths)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    shift = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    scheduler = euler(use_dynamic_shifting=True, shift_terminal=0.1, **shift)
    parts = {"text_encoder": t5(), "tokenizer": tokenizer()}
    return {**parts, "transformer": transformer, "vae": vae, "scheduler": scheduler}


def ltx() -> tuple[Any, dict]:
    return diffusers.LTXPipeline(**ltx_parts()), clip_call(64, 64, 9, max_sequence_length=32)


def ltx_image_to_video() -> tuple[Any, dict]:
    call = clip_call(64, 64, 9, image=torch.rand(2, 3, 64, 64), max_sequence_length=32)
    return diffusers.LTXImageToVideoPipeline(**ltx_parts()), call


def mochi() -> tuple[Any, dict]:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, text_embed_dim=16,
        time_embed_dim=4, max_sequence_length=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    text = {"text_encoder": t5(), "tokenizer": tokenizer()}
    pipe = diffusers.MochiPipeline(**text, transformer=transformer, vae=vae, scheduler=euler(invert_sigmas=True))
    return pipe, clip_call(num_frames=7, max_sequence_length=32)


def stable_diffusion_3() -> tuple[Any, dict]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
    )  # fmt: skip
    vae = image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609)
    text = {"text_encoder": clip(True), "text_encoder_2": clip(True), "text_encoder_3": t5(width=32)}
    names = {"tokenizer": tokenizer(77), "tokenizer_2": tokenizer(77), "tokenizer_3": tokenizer()}
    parts = {**text, **names, "transformer": transformer, "vae": vae, "scheduler": euler(shift=3.0)}
    return diffusers.StableDiffusion3Pipeline(**parts), image_call(guidance_scale=4.0)


def flux() -> tuple[Any, dict]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159)
    text = {"text_encoder": clip(), "text_encoder_2": t5(), "tokenizer": tokenizer(77), "tokenizer_2": tokenizer()}
    scheduler = euler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(**text, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipe, image_call()


def cogvideox() -> tuple[Any, dict]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=16,
        num_layers=2, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=32,
    )  # fmt: skip
    blocks = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}
    vae = diffusers.AutoencoderKLCogVideoX(
        **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    published = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.CogVideoXDDIMScheduler(**published, snr_shift_scale=3.0)
    text = {"text_encoder": t5(), "tokenizer": tokenizer()}
    pipe = diffusers.CogVideoXPipeline(**text, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipe, clip_call(num_frames=9, guidance_scale=3.0, max_sequence_length=32)


def stable_diffusion() -> tuple[Any, dict]:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = diffusers.DDIMScheduler(**published, clip_sample=False, set_alpha_to_one=False)
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    text = {"text_encoder": clip(), "tokenizer": tokenizer(77)}
    pipe = diffusers.StableDiffusionPipeline(**text, unet=unet, vae=image_vae(4), scheduler=scheduler, **checker)
    call = image_call(guidance_scale=3.0)
    del call["max_sequence_length"]
    return pipe, call


BUILDERS = [wan, wan_two_experts, wan_image_to_video, skyreels_v2, sana_video, hunyuan_video, ltx, ltx_image_to_video]
BUILDERS += [mochi, stable_diffusion_3, flux, cogvideox, stable_diffusion]


def build(builder: Callable[[], tuple[Any, dict]], seed: int = 0) -> tuple[Any, dict]:
    """The same weights every time, in float32 on the CPU; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe, call = builder()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe, call


FAMILIES: dict[str, Callable[[], tuple[Any, dict]]] = {b.__name__: lambda b=b: build(b) for b in BUILDERS}


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    """The networks that an alignment run trains."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    return [network for network in found if network is not None]
