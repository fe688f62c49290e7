"""What a mistyped name may have meant: only names that a slip of the fingers leads to, by their edit distance.

Knows only strings. Next: cli/usage.py for commands and options, plan/explain.py for parameters.
"""

from collections.abc import Iterable

MOST_NEAR = 3  # names that are offered


def find_near(name: str, known: Iterable[str], most: int = MOST_NEAR) -> list[str]:
    """Those of `known` with the fewest edits from `name`, at most one in three letters and three in all; without any,
    those that begin with it. [] if more than `most` are as near: that would be a list, not an answer."""
    limit = min(3, len(name) // 3)
    best: list[str] = []
    for other in dict.fromkeys(known):
        distance = count_edits(name, other, limit)
        if distance < limit:
            limit, best = distance, [other]
        elif distance == limit and limit > 0:
            best.append(other)
    best = best or [other for other in dict.fromkeys(known) if len(name) >= 3 and other.startswith(name)]
    return best if len(best) <= most else []


def count_edits(a: str, b: str, limit: int) -> int:
    """Letters to insert, leave out, replace or swap with the next to make `b` of `a`; `limit` + 1 if it is more."""
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[j] = min(row[j], older[j - 2] + 1)
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


def ask(near: Iterable[str]) -> str:
    """`; did you mean this or that?`, or nothing."""
    text = " or ".join(near)
    return f"; did you mean {text}?" if text else ""
