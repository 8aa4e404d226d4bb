"""Figures as PNG files: drawn whole or not at all, at a cost that is never more than the picture."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from fastcifar.errors import FastcifarError, reason
from fastcifar.runs.files import write_bytes, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(path: Path, plot: Callable[..., Figure], *given: Any) -> str | None:
    """Draws as `save` does, but any failure costs only the picture: it is returned as a line for the user, None
    where there was none.
    """
    try:
        save(path, plot, *given)
    except FastcifarError as error:
        return f"{path.name} was not drawn ({reason(error.__cause__ or error)})."
    return None


def save(path: Path, plot: Callable[..., Figure], *given: Any) -> None:
    """Writes the figure that `plot(*given)` makes as a PNG file, for which it makes the folder.

    Raises:
        FastcifarError: it cannot be drawn or written; a file that was there is as it was.
    """
    try:
        import_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # drawn as a box
            FigureCanvasAgg(plot(*given)).print_png(content)
    except Exception as error:
        raise FastcifarError(
            f"{path} cannot be drawn ({reason(error)}); see whether matplotlib is installed as it should be."
        ) from error
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getvalue())


def import_matplotlib() -> None:
    """Imports matplotlib even where MPLBACKEND names a backend that is not installed, as notebooks do; only pyplot
    needs one.

    A pyplot that is imported later has the backend that the variable names, where there is one.
    """
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        return
    backend = os.environ.pop("MPLBACKEND")
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def shortened(name: str, cells: int) -> str:
    """A name on one line, cut to a width of so many Latin letters."""
    text = Text(" ".join(name.split()))
    text.truncate(cells, overflow="ellipsis")
    return text.plain
