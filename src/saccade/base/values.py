"""Values from users and files: what they are, and how an error shows them."""

from math import isfinite
from numbers import Integral, Real

SHOWN = 80  # characters of a value in an error; no entry of a list takes less than one
MOST_COUNT = 2**63 - 1  # of any number that counts something: what a tensor of integers can hold


def is_integer(value: object) -> bool:
    """True for int and numpy's integers; False for bool, which Python counts among the integers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_count(value: object, least: int) -> bool:
    """Whether `value` is an integer from `least` to 2**63 - 1."""
    return is_integer(value) and least <= value <= MOST_COUNT  # type: ignore[operator]


def is_number(value: object) -> bool:
    """True for finite numbers that a float can hold; 10**400 is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(float(value))
    except OverflowError:
        return False


def show(value: object) -> str:
    """`value` for an error text: on one line, not long. An integer of 5,000 digits has no repr at all."""
    if type(value) in (str, list, tuple):  # a client's may have millions of entries
        value = value[:SHOWN]  # type: ignore[index]
    try:
        text = repr(value)
    except Exception:  # any class may define its own
        text = f"a value of type {type(value).__name__} that cannot be printed"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def show_count(n: int, noun: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def is_short(value: object) -> bool:
    """Whether a value is a text or an integer that can be spelled out."""
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 10)
