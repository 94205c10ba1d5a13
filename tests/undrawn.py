"""Figures saved as a pixel, for runs of which a test looks at no figure."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'


@contextmanager
def undrawn() -> Iterator[None]:
    """Nothing is drawn inside: that takes many times what a run of a few steps takes."""

    def save(self: Figure, target: Any, **options: Any) -> None:
        named = isinstance(target, str | Path)
        kind = options.get("format") or (Path(target).suffix[1:] if named else "png")
        content = DRAWING if kind == "svg" else PIXEL
        if named:
            Path(target).write_bytes(content)
        else:
            target.write(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield
