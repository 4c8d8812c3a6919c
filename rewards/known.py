"""The rewards that are known by name, with what a user wants to know before choosing one (`python -m rewards.list`).

Published models that cannot be loaded here, and what there is in their place:
    MJ-VIDEO         backbone only as code in its checkpoint; its head alone, from hidden states: rewards.mj_video; its
                     mixture over the dims of another reward: aspects
    AnimeReward      experts only in the code of several other projects; the mean of experts of your own: weighted
    DeeptraceReward  how its model is asked and answers is not known here; a general model asked likewise: vlm_defects
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """One row of the list."""

    target: str  # module:callable
    inputs: str  # what it looks at
    outputs: str  # what total and dims are
    scale: str  # range or typical values of total
    licence: str  # of the weights, where there are any
    memory: str  # of the weights alone
    verified: str  # how, honestly

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]


def _made(target: str, inputs: str, outputs: str, scale: str, verified: str) -> Known:
    """A reward that is made of others; see rewards.load for how these are named."""
    return Known(target, inputs, outputs, scale, "none of its own", "that of its parts", verified)


def _sprite(name: str, outputs: str, scale: str) -> Known:
    verified = "every attribute read right on clean renders; worked examples in tests/rewards/test_sprite.py"
    return Known(f"rewards.sprite:{name}", "sprite video, prompt", outputs, scale, "none: no weights", "none", verified)


_JUDGE = "the judge's (UnifiedReward MIT, VideoScore2 not stated)"

KNOWN = {
    "aspects": _made(
        "rewards.mixture:aspects",
        "a reward with dims",
        "weighted mean of aspects, which are weighted means of dims",
        "the dims'",
        "arithmetic by hand",
    ),
    "per_frame": _made(
        "rewards.frames:per_frame",
        "a reward of images, frames of the clip",
        "weighted sum over frames; dense holds each frame's",
        "the reward's",
        "arithmetic by hand",
    ),
    "weighted": _made(
        "rewards.combine:weighted",
        "several rewards",
        "weighted sum, or mean; dims are the parts",
        "that of the parts and their weights",
        "arithmetic by hand",
    ),
    "win_rate": _made(
        "rewards.comparison:win_rate",
        "a reward, all clips of a prompt",
        "share of the other clips that it beats (scope group)",
        "0 to 1",
        "arithmetic by hand",
    ),
    "aesthetic": Known(
        "rewards.aesthetic:AestheticReward",
        "frames",
        "mean rating of the frames' beauty",
        "about 1 to 10",
        "head Apache-2.0, CLIP ViT-L/14 MIT",
        "1.7 GB, fp32",
        "head against its layers, embedding against open_clip, on tiny ones; published weights not run here",
    ),
    "clip": Known(
        "rewards.clip:CLIPReward",
        "frames, prompt",
        "mean cosine of frames and prompt",
        "-1 to 1, published models 0.1 to 0.4",
        "the checkpoint's; OpenAI's and LAION's are MIT",
        "0.6 GB (B/32) to 4 GB (H/14), fp32",
        "against open_clip's and transformers' own paths on tiny checkpoints; published weights not run here",
    ),
    "hpsv2": Known(
        "rewards.hpsv2:HPSv2Reward",
        "frames, prompt",
        "mean cosine of frames and prompt, tuned on human choices",
        "0.2 to 0.35",
        "code Apache-2.0; the weights' repository states none",
        "4 GB, fp32",
        "within 1e-6 of the authors' steps redone in the test on a tiny checkpoint; published weights not run here",
    ),
    "hpsv3": Known(
        "rewards.hpsv3:HPSv3",
        "frames, prompt",
        "mean preference; dim sigma, its uncertainty",
        "about -5 to 15",
        "MIT (MizzenAI/HPSv3); base Qwen2-VL-7B Apache-2.0",
        "16 GB, bf16",
        "against transformers on a tiny model in the released format; published weights not run",
    ),
    "video_reward": Known(
        "rewards.video_reward:VideoReward",
        "video, prompt",
        "sum of the dims VQ, MQ, TA (visual, motion, text)",
        "each dim about N(0, 1)",
        "Apache-2.0 (KlingTeam/VideoReward); code MIT",
        "4.4 GB, bf16",
        "against transformers and peft on tiny models in both released layouts; published weights not run",
    ),
    "remote": Known(
        "rewards.remote:RemoteReward",
        "what the served reward sees, in 256 levels",
        "the served reward's",
        "the served reward's",
        "none: no weights",
        "none",
        "against the same rewards in process, on real servers",
    ),
    "vlm_defects": Known(
        "rewards.judges.defects:VLMDefects",
        "frames, prompt",
        "share of the clip without a defect that the judge finds; dims time, defects",
        "0 to 1",
        "the judge's; for general models, not for DeeptraceReward's own",
        "the model's, or none with an endpoint",
        "areas and times by hand, answers on scripted servers; what a published judge finds was not tried",
    ),
    "vlm_pairwise": Known(
        "rewards.judges.pairwise:VLMPairwise",
        "frames of two clips, prompt",
        "win rate in the group (scope group); dims by style",
        "0 to 1",
        _JUDGE,
        "the model's, or none with an endpoint",
        "formats and both orders on scripted servers; no published judge run",
    ),
    "vlm_score": Known(
        "rewards.judges.pointwise:VLMScore",
        "frames, prompt",
        "mean of the scores that the judge writes; dims by style",
        "0 to 1, or the judge's own",
        _JUDGE,
        "the model's, or none with an endpoint",
        "formats on scripted servers; a tiny Qwen2-VL through `transformers serve`; no published judge run",
    ),
    "vlm_yes": Known(
        "rewards.judges.pointwise:VLMYes",
        "frames, prompt; a reference clip if wanted",
        "probability of yes as the first word",
        "0 to 1",
        _JUDGE,
        "the model's, or none with an endpoint",
        "against the logits of a tiny Qwen2-VL, here and over HTTP; no published judge run",
    ),
    "pickscore": Known(
        "rewards.pickscore:PickScoreReward",
        "frames, prompt",
        "mean exp(logit_scale) cosine of frames and prompt, tuned on human choices",
        "15 to 26; scale=logit/26 about 0.6 to 1; scale=cosine about 0.15 to 0.26",
        "MIT",
        "4 GB, fp32",
        "against CLIPModel and its processor on a tiny checkpoint; published weights not run here",
    ),
    "sprite_background": _sprite("sprite_background", "closeness of the background's colour", "0 to 1"),
    "sprite_colour": _sprite("sprite_colour", "closeness of the sprite's colour", "0 to 1"),
    "sprite_match": _sprite("sprite_match", "share of the prompt's attributes that are right", "0 to 1"),
    "sprite_motion": _sprite("sprite_motion", "moves fast, the way the prompt says", "-1 to 1"),
    "sprite_shape": _sprite("sprite_shape", "probability of the named shape", "0 to 1"),
    "sprite_smoothness": _sprite("sprite_smoothness", "how even the path is", "0 to 1"),
    "vlm_rm": Known(
        "rewards.vlm_rm:GoalBaselineReward",
        "frames, prompt or a fixed target, a baseline",
        "mean closeness of frames and target, along the way from the baseline",
        "at most 1; alpha=0 is the cosine",
        "the checkpoint's; OpenAI's and LAION's are MIT",
        "0.6 GB (B/32) to 4 GB (H/14), fp32",
        "against the formula in numpy on a tiny checkpoint; published weights not run here",
    ),
}
