"""Filling the templates of the pages: everything escaped, as markup and as characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from kronecker_probe.table.escaping import printable


def rendered(template: str, **values: Any) -> bytes:
    """A page of this folder's ``template`` with ``values``, in UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        # set, not inferred: jinja2 infers it from the name, and .j2 would turn it off
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values).encode()


def _printable(value: Any) -> Any:
    """Text without control characters; jinja2 escapes its markup after this."""
    return printable(value) if type(value) is str else value
