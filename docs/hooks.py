"""What MkDocs is told about the docstrings: cross-references are written as Sphinx has them."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of Sphinx (``:func:`` and its like) before what they refer to."""
    return _ROLE.sub("", html)
