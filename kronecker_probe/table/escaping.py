"""Text from files and users, made safe for each medium: terminal, figure, page, link.

Names, notes and paths may hold anything. They are escaped once, where they leave for a medium:
the terminal by :func:`for_terminal`, figures by :func:`printable_table`, pages by jinja's
autoescape over :func:`printable`, links by :func:`link`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from urllib.parse import quote

import pandas as pd

# Cc controls, Cf format characters (bidirectional overrides, zero width), Cs lone surrogates,
# Zl and Zp line and paragraph separators, Cn and Co what no font or XML parser knows
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co"}
# the columns of a table that hold names and texts
_TEXTS = ("parameter", "approximation", "metric", "note", "optimizer", "lr", "settings")


def printable(text: str, *, keep: str = "\n") -> str:
    r"""``text`` with every character that does not print as an escape such as ``\x1b``.

    Args:
        text: Any string, also one that UTF-8 cannot encode.
        keep: Control characters that stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter
        if letter in keep or unicodedata.category(letter) not in _UNPRINTABLE
        else letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        for letter in text
    )


def for_terminal(text: object) -> str:
    r"""``text`` as rich markup that shows it letter by letter: no escape sequence, style or link.

    Args:
        text: A string, path or error.
    """
    from rich.markup import escape

    return escape(printable(str(text)))


def printable_table(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose names and texts can be drawn: figures, and so SVG files, are made of it.

    The table itself is returned where nothing is to be escaped.
    """
    changed = {}
    for column in (name for name in _TEXTS if name in table):
        names = table[column].dropna().unique()
        escaped = {name: printable(str(name), keep="") for name in names}
        if any(name != text for name, text in escaped.items()):
            changed[column] = table[column].map(escaped, na_action="ignore")
    return table.assign(**changed) if changed else table


def link(parts: Sequence[str]) -> str:
    """A relative link to a file below the page, percent-quoted; never a scheme or another host."""
    return "./" + "/".join(quote(part, safe="", errors="surrogatepass") for part in parts)
