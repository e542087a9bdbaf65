"""Formatting of text and numbers on the page. Every text from a run passes through ``text``."""

import math
import re
from html import escape
from typing import Any

from segzero_jax.report.run import number

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_SHORT = {"iou": "IoU", "giou": "gIoU", "ciou": "cIoU", "l1": "L1"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(value: Any) -> str:
    """Any value of a run as escaped text; a dash for None."""
    return NOTHING if value is None else escape(str(value))


def show(value: Any, digits: int = 3) -> str:
    """A number to about three significant digits, with powers of ten if needed; a dash for anything else."""
    known = number(value)
    if known is None:
        return NOTHING
    if known == 0:
        return "0"
    size = abs(known)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, exponent = f"{known:.1e}".partition("e")
        return f"{mantissa.replace('-', MINUS)}{_TIMES}10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    count = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{known:,.{count}f}".replace("-", MINUS)


def bound(value: float) -> str:
    """A limit without trailing zeros: 8, 2.5."""
    return f"{value:g}"


def label(name: Any) -> str:
    """The name of a component or phase in words."""
    words = text(name).replace("_", " ")
    return re.sub(rf"\b({'|'.join(_SHORT)})\b", lambda match: _SHORT[match.group()], words)


def fixed(value: Any) -> str:
    """An IoU or a rate to three places; a dash for anything that is not a number."""
    return places(value, 3)


def places(value: Any, count: int = 2) -> str:
    """A number to a fixed count of places, for columns; a dash for anything else."""
    known = number(value)
    return NOTHING if known is None else f"{known:.{count}f}".replace("-", MINUS)


def signed(value: float, places: int = 3) -> str:
    """A change with its sign."""
    return f"{value:+.{places}f}".replace("-", MINUS)


def direction(change: float, least: float = 0.0) -> str:
    """The CSS class for the colour of a change of more than ``least``."""
    return "up" if change > least else "down" if change < -least else ""
