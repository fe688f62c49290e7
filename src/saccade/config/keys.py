"""Typed access to the keys of a JSON object, collecting every problem instead of stopping at the first.

A getter that refuses returns a harmless value of the right type (0, "", ()), so that reading goes on and the user sees
all mistakes at once. Knows no model: which keys there are, and what they mean, is model.py's.
"""

import math
import sys
from collections.abc import Collection, Mapping
from typing import Any

from saccade.base.printable import shorten

WHOLE_LIMIT = 2**31 - 1
SHOWN_CHARACTERS = 60  # characters of a found value


class Keys:
    """The object's `values`, and the `problems` and `notes` found so far. `prefix` names nested objects."""

    def __init__(
        self,
        values: Mapping[str, Any],
        prefix: str = "",
        problems: list[str] | None = None,
        notes: list[str] | None = None,
    ):
        self.values = values
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems
        self.notes: list[str] = [] if notes is None else notes

    def refuse(self, name: str, found: Any, expected: str) -> None:
        self.problems.append(f"{self.prefix}{name}: {expected}, found {show_json(found)}")

    def whole(self, name: str, least: int = 1, default: int | None = None) -> int:
        """A whole number. Absent or null means `default`; without a default it is a problem."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= WHOLE_LIMIT:
            return value
        self.missing_or(name, f"expected a whole number from {least} to {WHOLE_LIMIT}")
        return 0

    def number(self, name: str, default: float | None = None, zero: bool = False) -> float:
        """A finite number above zero (or zero, if `zero`)."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (0 < value <= 1e30 or (zero and value == 0))
        ):
            return float(value)
        self.missing_or(name, "expected a finite number" + (" of at least 0" if zero else " above 0"))
        return 0.0

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.refuse(name, value, "expected true or false")
        return default

    def token(self, name: str) -> int | None:
        """A token id; what is none is a note, as in `tokens`."""
        ids = self.tokens(name)
        return ids[0] if ids else None

    def tokens(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them. What is none is a note: ids end answers, and change no number."""
        ids, oddities = read_token_ids(self.values.get(name))
        self.notes += [f"{self.prefix}{name}: {text}" for text in oddities]
        return ids

    def table(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.refuse(name, value, "expected an object")
        return {}

    def choices(
        self, name: str, accepted: tuple[str, ...], count: int, letters: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """A list of `count` words, each one of `accepted`; or, with `letters`, a string of one letter per word."""
        value = self.values.get(name)
        if not isinstance(value, str if letters else list):
            self.refuse(name, value, "expected a list")
            return ()
        words = [letters.get(c, c) for c in value] if letters else value
        odd = next((w for w in words if w not in accepted), None)
        if odd is not None:
            self.refuse(name, odd, f"expected only {' and '.join(letters or accepted)}")
            return ()
        if count and len(words) != count:
            self.refuse(name, len(words), f"expected {count} entries (num_hidden_layers)")
            return ()
        return tuple(words)

    def expect(self, name: str, accepted: tuple[Any, ...], why: str = "") -> None:
        """Refuse a value that is not one of `accepted`. An absent key is accepted; true is not 1."""
        if name not in self.values:
            return
        value = self.values[name]
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in accepted):
            supported = " or ".join(show_json(a) for a in accepted)
            self.refuse(name, value, f"supported: {supported}{f' ({why})' if why else ''}")

    def limit(self, name: str, value: int, most: int) -> None:
        if value > most:
            self.refuse(name, value, f"expected at most {most}")

    def within(self, name: str, value: float, least: float, most: float) -> None:
        """Refuse a number outside of [least, most]; 0 was refused before, or means that it is not set."""
        if value and not least <= value <= most:
            self.refuse(name, value, f"expected a number from {least:g} to {most:g}")

    def note_unknown(self, known: Collection[str]) -> None:
        """Fold the keys that are in no table into one note."""
        unknown = sorted(str(k) for k in self.values if k not in known)
        if unknown:
            listed = ", ".join(self._show_key(k) for k in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
            plural = "s" if len(unknown) > 1 else ""
            self.notes.append(f"{len(unknown)} unknown key{plural} ignored: {listed}")

    def _show_key(self, name: str) -> str:
        """A key, and its value if that is a number: whoever reads it can tell what was passed over."""
        value = self.values.get(name)
        number = f"={show_json(value)}" if isinstance(value, int | float) else ""
        return shorten(name, SHOWN_CHARACTERS) + number

    def missing_or(self, name: str, expected: str) -> None:
        if name not in self.values:
            self.problems.append(f"{self.prefix}{name}: absent, {expected}")
        else:
            self.refuse(name, self.values[name], expected)


def show_json(value: Any) -> str:
    """A value as JSON spells it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        text = '"' + shorten(value, SHOWN_CHARACTERS) + '"'
    elif isinstance(value, int) and abs(value) > 10**18 or isinstance(value, float) and not math.isfinite(value):
        text = f"{value:.3g}" if isinstance(value, float) else "a number of more than 18 digits"
    elif isinstance(value, list | tuple):
        text = f"a list of {len(value)}"
    elif isinstance(value, Mapping):
        text = f"an object of {len(value)} keys"
    else:
        text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def read_token_ids(value: Any) -> tuple[tuple[int, ...], list[str]]:
    """The token ids in what a file says, one or a list, each once; and what is odd about it. Other conventions write -1
    for none, 7.0 or "7"."""
    ids: dict[int, None] = {}
    oddities = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        number = read_number(item)
        if number is None or number != int(number) or not 0 <= number <= WHOLE_LIMIT:
            oddities.append(f"{show_json(item)} is no token id and is ignored")
            continue
        if type(item) is not int:
            oddities.append(f"{show_json(item)} is taken as {int(number)}")
        ids[int(number)] = None
    return tuple(ids), oddities


def read_number(value: Any) -> int | float | None:
    """A finite number, also one that is written as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max and value == value else None
