"""Which backend answers: an endpoint where a url is given, else a model in this process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from rewards.contract import RewardError
from rewards.judges.chat import Chat
from rewards.judges.endpoint import Endpoint
from rewards.judges.in_process import InProcess


def check_chat(name: str, options: Mapping[str, Any]) -> type:
    """Validate the options of a backend without network and weights; `url` decides which backend it is.

    Returns: Endpoint or InProcess.
    Raises: RewardError, one line.
    """
    backend = Endpoint if options.get("url") is not None else InProcess
    taken = [key for key in inspect.signature(backend).parameters if key != "name"]
    for option in options:
        if option not in taken:
            near = get_close_matches(option, taken, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            where = "with url" if backend is Endpoint else "without url (the model runs in this process)"
            raise RewardError(f"reward {name}: no option {option!r} {where}{hint}; options: {', '.join(taken)}")
    if not isinstance(options.get("model"), str) or not options["model"]:
        raise RewardError(
            f"reward {name}: no model named; give model (as the server of url calls it, or a folder or owner/name "
            "to run here)"
        )
    backend.check(name=name, **options)
    return backend


def open_chat(name: str, cache: str | None, system: str | None, options: Mapping[str, Any]) -> Chat:
    """Build the backend that the options name, with its cache."""
    backend = check_chat(name, options)
    return Chat(backend(name=name, **options), name, cache, system)
