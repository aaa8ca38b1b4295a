"""The two errors of flexnorm, and the one way in which their texts are built.

Every text says the rule, what was received and what to type instead, and draws the user's own pattern with
carets under the guilty part:

    the left side of the pattern must name every axis of x, but x has 3 axes and the pattern names 4
        n (g c) h w -> n g
        ^ ^^^^^ ^ ^
      received: x of shape (8, 64, 32)
      instead:  write "..." for the axes that have no name of their own
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

Span = tuple[int, int]  # first character and the one after the last, in the user's own string


class SpecError(ValueError):
    """A pattern, an option or a name that cannot mean anything, whatever the tensor."""


class ShapeError(ValueError):
    """A pattern that means something, given a tensor, mask, label or parameter that does not fit it."""


def draw(text: str, spans: Iterable[Span]) -> str:
    """The text, and under it a line with carets below every span; an empty span gets one caret."""
    text = text.translate(_VISIBLE)
    marks = [" "] * (len(text) + 1)
    for start, stop in spans:
        for place in range(start, max(stop, start + 1)):
            marks[place] = "^"
    carets = "".join(marks).rstrip()
    return f"    {text}\n    {carets}" if carets else f"    {text}"


def say(
    rule: str,
    *,
    text: str | None = None,
    spans: Iterable[Span] = (),
    received: str | None = None,
    instead: str,
) -> str:
    """The text of an error: the rule, the drawing, what was received, what to type instead."""
    lines = [rule]
    if text is not None:
        lines.append(draw(text, spans))
    if received is not None:
        lines.append(f"  received: {received}")
    lines.append(f"  instead:  {instead}")
    return "\n".join(lines)


def shown(value: Any, most: int = 80) -> str:
    """A value as errors show it: of an array what it is, of anything else the beginning, on one line."""
    if hasattr(value, "dtype") and len(getattr(value, "shape", "")):
        return f"a {type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}"
    return " ".join(repr(value).split())[:most]


def as_int(value: Any) -> int | None:
    """The value as an int, if it is a whole number of any library's; None otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    if type(value).__name__ == "SymInt":  # of torch: it stands for an int while tracing, and must stay what it is
        return value  # type: ignore[no-any-return]
    try:
        return operator.index(value)
    except TypeError:  # a tensor of several elements, or no integers
        return None


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that the user probably meant, if any is near."""
    found = get_close_matches(word, list(choices), n=1)
    return found[0] if found else None


# A tab or a line break inside the pattern would move the carets: each is shown as one blank.
_VISIBLE = {ord(c): " " for c in "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
