"""Replies on disk: one JSON file for a question, named by its digest."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rewards.contract import RewardError


class ReplyCache:
    """A folder of replies. Several processes may share it: a file appears whole or not at all."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RewardError(f"cache {folder}: cannot be made: {error}") from error

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply kept under a key; None where there is none, or the file is damaged."""
        try:
            kept = json.loads(self.path(key).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) and kept.keys() == {"text", "finished", "tokens"} else None

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Keep a reply. Raises: OSError where the disk is full or the folder was removed."""
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(reply, file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
