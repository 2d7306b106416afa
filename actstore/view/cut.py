"""Text that is too long to be looked at: a word of 100,000 characters is one token to BERT.

A page that held such tokens whole would take a browser minutes to lay out, so a view carries the
beginning and says how long the whole is.
"""

from __future__ import annotations

_CHARACTERS = 120  # of a token; the longest in a page of prose have some 30
_CONTEXT = 400  # of the tokens before or behind one


def cut(text: str) -> str:
    """Return a token, or its beginning and how long it is."""
    if len(text) <= _CHARACTERS:
        return text
    return f"{text[:_CHARACTERS]}… [{len(text):,} characters]"


def cut_before(text: str) -> str:
    """Return the end of what stands before a token."""
    return text if len(text) <= _CONTEXT else f"…{text[-_CONTEXT:]}"


def cut_after(text: str) -> str:
    """Return the beginning of what stands behind a token."""
    return text if len(text) <= _CONTEXT else f"{text[:_CONTEXT]}…"
