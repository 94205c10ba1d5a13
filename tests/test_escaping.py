"""Names and texts from files reach no medium raw: terminal, figure, page, link, directory."""

from __future__ import annotations

import html.parser
import io
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console

from kronecker_probe import plots
from kronecker_probe.cli import terminal
from kronecker_probe.report.template import rendered
from kronecker_probe.table.escaping import for_terminal, link, printable, printable_table
from tests.synthetic_tables import frame, quality, spectrum

NASTY = [
    "\x1b[31mred\x1b[0m", "[red]x[/]", "[link=http://e.vil]x[/link]", "a\\[b]", "\x00", "\x9b2J",
    "\u202egpj.exe", "\ud800", "$\\frac{1}{2}$", "$", "<script>alert(1)</script>", "&amp;",
    "javascript:alert(1)", "../../x", "\ufffe", "\x7f", "\u2028", "a\rb", "\x1b]8;;http://x\x07y",
    "weights é 权重 🙂",
]  # fmt: skip
names = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), min_size=1, max_size=20))


def harmless(text: str) -> bool:
    """Whether no character of it but a line's end controls a terminal or hides others."""
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return not any(unicodedata.category(one) in hidden and one != "\n" for one in text)


@given(names)
def test_printable_text_keeps_what_prints_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert harmless(shown)
    shown.encode()
    if harmless(text) and not any(unicodedata.category(one) in {"Cn", "Co"} for one in text):
        assert shown == text


@given(names)
def test_a_terminal_shows_the_letters_of_a_name_and_nothing_else(name: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=400)
    console.print(for_terminal(name), soft_wrap=True, highlight=False, emoji=False)
    assert out.getvalue() == printable(name) + "\n"


@pytest.mark.parametrize("name", NASTY)
def test_a_table_of_nasty_names_prints_harmless(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=out, force_terminal=False, width=200))
    monkeypatch.setenv("COLUMNS", "200")
    name = name.encode("utf-8", "replace").decode()  # as a Parquet file holds it
    rows = quality(0, name, {"optimal": 0.9, "kfac": 0.8, name: 0.7})
    terminal.show_table(frame(rows))
    terminal.show_line(f"figure  {name}")
    assert harmless(out.getvalue())


@given(names)
@example("\x1b")
@settings(max_examples=8, deadline=None)
def test_figures_of_nasty_names_are_xml(name: str) -> None:
    rows = quality(0, name, {"optimal": 0.9, "kfac": 0.8})
    table = frame([*rows, *spectrum(0, name, [3.0, 1.0], 4.0)]).astype({"parameter": "object"})
    for plot in (plots.plot_ladder, plots.plot_spectrum):
        figure, out = Figure(), io.StringIO()
        plot(table, figure=figure, parameters=[name])
        figure.savefig(out, format="svg")
        text = out.getvalue()
        assert ET.fromstring(text).tag.endswith("svg")
        assert harmless(text.replace("\t", ""))


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]

    def handle_data(self, data: str) -> None:
        self.text += data


@given(names)
@settings(max_examples=20, deadline=None)
def test_pages_hold_the_text_and_no_markup_of_it(name: str) -> None:
    from kronecker_probe.report.comparison_page import Summary

    summary = Summary(("optimizer",), [[name]], ("optimizer",), {name: [[name]]}, [name], {})
    data = rendered(
        "comparison.html.j2", name=name, summary=summary, about_runs="", about_layers="",
        image="", links={name: link([name, "report.html"])},
    )  # fmt: skip
    page = _Page()
    page.feed(data.decode())
    assert printable(name).strip() in page.text
    assert "script" not in page.tags
    (to,) = [one for one in page.links if not one.startswith("data:image/png")]
    assert to.startswith("./")


@given(st.lists(names, min_size=1, max_size=3))
def test_a_link_has_no_scheme_host_or_query(parts: list[str]) -> None:
    to = link(parts)
    split = urlsplit(to)
    assert (split.scheme, split.netloc, split.query, split.fragment) == ("", "", "", "")
    assert to.isascii()
    assert to.count("/") == len(parts)


def test_a_table_without_anything_to_escape_is_not_copied(tmp_path: Path) -> None:
    table = frame(quality(0, "a", {"optimal": 0.9}))
    assert printable_table(table) is table
