"""Given videos: the records of the recipe's files, and the latents of their members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from samplers import Encoder

from .config import Recipe
from .data import Group, Member, Pair, Prompt, conditions, read_preferences
from .data.latents import LatentCache, check_shapes, load_latent
from .distributed import Processes
from .errors import Problems, UserError
from .policy import Policy

if TYPE_CHECKING:
    from .training import Run

T = TypeVar("T")
Choose = Callable[[Recipe, Sequence[Pair | Group], str], list[T]]  # the recipe, records, where they are from


class Given:
    """What a run learns from in place of samples of its own. Nothing is read or encoded before it is asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.read: dict[str, Sequence[Pair | Group]] = {}

    def records(self, path: str) -> Sequence[Pair | Group]:
        """All that a preference file holds."""
        if path not in self.read:
            self.read[path] = read_preferences(path)
        return self.read[path]

    def chosen(self, key: str, choose: Choose[T]) -> list[T]:
        """What there is to learn from in data.`key`; nothing where that names no file. Raises: what `choose` does."""
        path = getattr(self.run.recipe.data, key)
        return choose(self.run.recipe, self.records(path), f"data.{key}: {path}") if path else []

    @cached_property
    def encoder(self) -> Encoder:
        """Of the recipe's pipeline and call."""
        return encoder_of(self.run.policy, self.run.stream.prompts[0])

    @cached_property
    def latents(self) -> LatentCache:
        """Of the videos that come without a latent file."""
        recipe = self.run.recipe
        return LatentCache(Path(recipe.data.latents or recipe.folder / "latents"), self.encoder, recipe.fps)

    def prepare(self) -> None:
        """Encode the videos that have no latent. Raises: Problems for all that cannot be encoded, or do not fit."""
        videos: dict[Path, str] = {}  # a file -> where it is mentioned first
        latents: dict[Path, str] = {}
        for key in ("preferences", "held_out"):
            path = getattr(self.run.recipe.data, key)
            for record in self.records(path) if path else []:
                for member in record.members:
                    found = videos if member.latent is None else latents
                    found.setdefault(member.latent or member.video, f"data.{key}: {path} line {record.line}")
        if latents:
            check_shapes(latents, self.encoder.state_shape)
        if videos:
            encode(self.latents, videos, self.run.processes, self.run.recipe.batch.rollout or 1, self.run.display.say)

    def load(self, member: Member) -> tuple[Tensor, Tensor | None]:
        """The clean state of a member, and the noise that it was generated from, if it is known."""
        if member.latent is None:
            return self.latents.load(member.video), None
        return load_latent(member.latent, self.encoder.state_shape)


def encoder_of(policy: Policy, prompt: Prompt) -> Encoder:
    """Of the policy's pipeline; of the prompt only its image matters. Raises: UserError where it cannot encode."""
    try:
        return policy.encoder(prompt.text, **conditions([prompt]))
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def encode(
    cache: LatentCache, videos: dict[Path, str], processes: Processes, batch_size: int, say: Callable[[str], None]
) -> None:
    """Encode what is missing, each process its share. Raises: Problems, in all processes together."""
    problems: list[str] = []

    def progress(done: int, of: int) -> None:
        if done == of or done // 100 > (done - batch_size) // 100:
            say(f"encoded {done} of {of} videos")

    try:
        cache.encode_all(dict(processes.share(list(videos.items()))), batch_size, progress)
    except Problems as error:
        problems = list(error.lines)
    if processes.any(bool(problems)):
        raise Problems(processes.union(problems))
