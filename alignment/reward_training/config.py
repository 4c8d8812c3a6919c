"""What a recipe says of the training of a reward model, besides model and data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RewardModelConfig:
    loss: str = "btt"  # btt, bt, regression or yes_no
    dimensions: list[str] = field(default_factory=lambda: ["VQ", "MQ", "TA"])  # of labels or scores; Overall: `label`
    theta: float = 5.0  # of btt: above 1, more makes more ties
    ties: str = "half"  # of bt: half, or skip
    tie_eps: float = 0.0  # scores that are no further apart are a tie
    pairs: str = "given"  # or all: every two clips of a batch whose scores are known, of whatever prompt
    batch_size: int = 32  # pairs or groups an update, over all processes
    template: str | None = None  # file with {text_prompt} and the dimensions' tokens; of yes_no {prompt}; None: our own
    positions: str | None = None  # of tokens: row or native; None: row (as published) for Qwen2-VL, native for others
    vision: bool = True  # train the vision tower, whole
    lora_dropout: float = 0.05
    vision_lr: float | None = None  # of the vision tower; None: optimizer.lr
    merger_lr: float | None = None  # of the layers from there to the language model
    token_lr: float | None = None  # of the special tokens' embeddings
    from_scratch: bool = False  # random weights: of model.path, the configuration and the tokenizer count alone
    fps: float = 2.0  # frames a second to look at
    num_frames: int | None = None  # or a fixed number
    min_pixels: int = 128 * 28 * 28  # of a frame, which is resized to within these bounds
    max_pixels: int = 448 * 448
    frames: str | None = None  # folder of prepared frames; None: inside the run folder
    frames_gb: float = 50.0  # that it may hold
    workers: int = 4  # threads that prepare frames
    norm_videos: int = 256  # held-out clips that the saved mean and deviation of scores are measured on
