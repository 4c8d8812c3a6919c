"""Prompts and preferences."""

from .latents import LatentCache, fit_video, has_noise, load_latent, save_latent
from .media import check_media
from .preference_json import parse_record, to_json
from .preferences import Group, Member, Pair, combined, judged_by_people, score_of
from .prompts import Prompt, PromptStream, by_image, conditions, read_image, read_prompts
from .readers import read_preferences, read_videos
from .segments import frame_labels, num_segments, segment_bounds, segment_of_latent_frames
from .selection import (
    all_pairs,
    best_worst,
    btt_label,
    decided,
    exchanged,
    label_from_scores,
    pair_of,
    pareto_front,
    pareto_pairs,
    rarity_weights,
    standard_gaps,
)
from .stream import Stream

__all__ = [
    "Group",
    "LatentCache",
    "Member",
    "Pair",
    "Prompt",
    "PromptStream",
    "Stream",
    "all_pairs",
    "best_worst",
    "btt_label",
    "by_image",
    "check_media",
    "combined",
    "conditions",
    "decided",
    "exchanged",
    "fit_video",
    "frame_labels",
    "has_noise",
    "judged_by_people",
    "label_from_scores",
    "load_latent",
    "num_segments",
    "pair_of",
    "pareto_front",
    "pareto_pairs",
    "parse_record",
    "rarity_weights",
    "read_image",
    "read_preferences",
    "read_prompts",
    "read_videos",
    "save_latent",
    "score_of",
    "segment_bounds",
    "segment_of_latent_frames",
    "standard_gaps",
    "to_json",
]
