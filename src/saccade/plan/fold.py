"""Fold names that differ only in their numbers: 14,848 lines of experts become one.

    model.layers.{3-60}.mlp.experts.{0-255}.gate_proj.weight

A folded name is exact: it stands for every combination of its ranges and for nothing else, so a hole stays visible;
only ranges of more than 32 runs are cut, with a count.
Standard library only; knows nothing of plans. Next: show.py prints with it.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# A number, unless it belongs to a word: F8_E4M3, weight_scale_2 and 128x128 keep theirs (the second 128).
NUMBER_PATTERN = re.compile(r"\b(\d+)")
GLUED = re.compile(r"(\d+)")  # any; only where a list would be long otherwise: t{0-999}
SHORT_LIST = 20  # templates that are no long list
RUNS = 32  # of numbers in one pair of braces; a million numbers without a pattern would be a line of 8 MB
MOST_NUMBERS = 100  # a text with more is no list of names: `boxes` recurses once per number
DIGITS = 18  # nor with longer ones: int() refuses 4,301 digits

Numbers = tuple[str, ...]


class Line(NamedTuple):
    """One line that stands for several texts."""

    text: str  # with {ranges} where the members differ
    members: tuple[int, ...]  # which of the texts, by index, ascending


def split(text: str, number: re.Pattern[str] = NUMBER_PATTERN) -> tuple[str, Numbers]:
    """`a.3.b.17` -> its template `a.{}.b.{}` and its numbers `("3", "17")`. `number` is NUMBER or GLUED."""
    pieces = number.split(text)
    if len(pieces) > 2 * MOST_NUMBERS or "{}" in text or max(map(len, pieces[1::2]), default=0) > DIGITS:
        return text, ()  # says what it says, and folds with nothing
    return "{}".join(pieces[::2]), tuple(pieces[1::2])


def join(template: str, numbers: Sequence[str]) -> str:
    """The inverse of `split`; a number may be any text, such as a range."""
    if not numbers:  # the text as it stands, "{}" and all
        return template
    pieces = template.split("{}")
    return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))


def fold(texts: Iterable[str]) -> list[str]:
    """Few lines that stand for exactly `texts`, in order of first appearance."""
    return [line.text for line in fold_lines(texts)]


def fold_prose(texts: Iterable[str]) -> list[str]:
    """As `fold`, for sentences: numbers that agree in each of them, a layer that is named twice, count as one."""
    return [line.text for line in fold_lines(texts, link=True)]


def cut_lines(lines: Sequence[str], most: int) -> list[str]:
    """At most `most` lines, and how many more there are."""
    return [*lines[:most], f"and {len(lines) - most:,} more"] if len(lines) > most else list(lines)


def pick(names: Iterable[str]) -> re.Pattern[str]:
    """The numbers by which names fold: those inside of words too, if there are more than a few kinds of names."""
    kinds: set[str] = set()
    for name in names:
        kinds.add(split(name)[0])
        if len(kinds) > SHORT_LIST:
            return GLUED
    return NUMBER_PATTERN


def fold_lines(texts: Iterable[str], link: bool = False, number: re.Pattern[str] | None = None) -> list[Line]:
    """As `fold`, or `fold_prose` if `link`, and which texts each line stands for. `number`: as `pick` chose it."""
    texts = list(texts)
    number = NUMBER_PATTERN if link else number or pick(texts)
    groups: dict[str, dict[Numbers, list[int]]] = {}
    for i, text in enumerate(texts):
        template, numbers = split(text, number)
        groups.setdefault(template, {}).setdefault(numbers, []).append(i)
    lines = []
    for template, by_numbers in groups.items():
        places = list(range(len(next(iter(by_numbers)))))  # of each position, the column that it is read from
        if link:
            columns = list(zip(*by_numbers, strict=True))
            places = [columns.index(column) for column in columns]
        kept = sorted(set(places))
        members = {tuple(numbers[k] for k in kept): indices for numbers, indices in by_numbers.items()}
        for sets in boxes(list(members)):
            shown = dict(zip(kept, map(ranges, sets), strict=True))
            found = sorted(i for numbers in product(sets) for i in members[numbers])
            lines.append(Line(join(template, [shown[k] for k in places]), tuple(found)))
    return sorted(lines, key=lambda line: line.members[0])


def merge(texts: Sequence[str]) -> str:
    """One line for texts of the same template; unlike `fold` it may stand for more combinations than there are."""
    if len(set(texts)) == 1:
        return texts[0]
    template, _ = split(texts[0])
    columns = zip(*(split(text)[1] for text in texts), strict=True)
    return join(template, [ranges(column) for column in columns])


def boxes(tuples: Sequence[Numbers]) -> list[list[list[str]]]:
    """Split distinct tuples into products of sets, exactly: a list of boxes, each one list of values per position."""
    if not tuples[0]:
        return [[]]
    by_first: dict[str, list[Numbers]] = {}
    for first, *rest in tuples:
        by_first.setdefault(first, []).append(tuple(rest))
    by_rest: dict[frozenset[Numbers], list[str]] = {}
    for first, rests in by_first.items():
        by_rest.setdefault(frozenset(rests), []).append(first)
    return [[firsts, *box] for rests, firsts in by_rest.items() for box in boxes(list(rests))]


def product(sets: Sequence[Sequence[str]]) -> Iterable[Numbers]:
    """Every tuple of a box."""
    if not sets:
        return [()]
    return [(first, *rest) for rest in product(sets[1:]) for first in sets[0]]


def ranges(numbers: Iterable[str]) -> str:
    """`{0-2,6-74:4}` is 0, 1, 2 and every fourth from 6 to 74; a single number stands bare."""
    values = sorted(set(numbers), key=lambda n: (int(n), n))
    if len(values) == 1:
        return values[0]
    runs: list[str] = []
    i = 0
    while i < len(values):
        step = int(values[i + 1]) - int(values[i]) if i + 1 < len(values) else 0
        j = i
        while j + 1 < len(values) and int(values[j + 1]) - int(values[j]) == step:
            j += 1
        if step != 1 and j - i < 3:  # two or three apart are not yet a pattern: say the first, look again
            j = i
        runs.append(values[i] if j == i else f"{values[i]}-{values[j]}" + (f":{step}" if step != 1 else ""))
        if len(runs) == RUNS and j + 1 < len(values):
            runs.append(f"... {len(values) - j - 1:,} more")
            break
        i = j + 1
    return "{" + ",".join(runs) + "}"
