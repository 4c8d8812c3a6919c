"""Prompts and preferences."""

from .prompts import Prompt, PromptStream, by_image, conditions, read_image, read_prompts

__all__ = ["Prompt", "PromptStream", "by_image", "conditions", "read_image", "read_prompts"]
