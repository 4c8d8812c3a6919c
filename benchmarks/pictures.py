"""Matplotlib, which is installed with the benchmarks alone."""

from __future__ import annotations

from types import ModuleType

from alignment.errors import UserError

INSTALL = 'pip install -e ".[benchmarks]"'


def pyplot() -> ModuleType:
    """Matplotlib's pyplot, without a display. Raises: UserError without it, so commands call it first, too."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"the picture needs matplotlib: {INSTALL}") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
