"""Problems as lines that a person can read: those alike but for numbers are one, causes stand before what follows.

Looks at Problems and at the index of the files. Next: fold.py; show.py prints whole plans.
"""

from collections.abc import Iterable

from saccade.checkpoint.coding import find_codes
from saccade.checkpoint.encoding import weight_of
from saccade.checkpoint.index import Index
from saccade.errors import Problem
from saccade.plan.fold import fold_lines, merge, pick, split

LOST = frozenset({"truncated", "header", "unreadable", "missing-file"})  # problems of a file that may hide its tensors
PROBLEM_LINES = 40
CHECK_LINES = 400  # of `check`, whose purpose is to name what is wrong


def show_problems(problems: Iterable[Problem], limit: int | None = PROBLEM_LINES) -> str:
    """One line for problems of one kind whose names and texts differ only in numbers; at most `limit` lines."""
    problems = list(problems)
    number = pick(p.name for p in problems)
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for p in problems:
        alike.setdefault((p.kind, split(p.name, number)[0], split(p.text)[0]), []).append(p)
    lines: list[str] = []
    shown = 0
    for group in alike.values():
        for line in fold_lines((p.name for p in group), number=number):
            if len(lines) == limit:
                return "\n".join([*lines, f"and {len(problems) - shown:,} more"])
            members = [group[i] for i in line.members]
            count = f" ({len(members):,} of them)" if len(members) > 1 else ""
            lines.append(f"{members[0].kind}: {line.text}{count} {merge([p.text for p in members])}")
            shown += len(members)
    return "\n".join(lines)


def show_causes(problems: Iterable[Problem], index: Index, limit: int | None = PROBLEM_LINES) -> str:
    """As `show_problems`, less what only follows from files whose headers cannot be read, or that are not here: of all
    tensors that are nowhere else, one line, under the first of these files."""
    readable = {file.name for file in index.files if file.tensors}
    lost = [p.name for p in index.problems if p.kind in LOST and p.name not in readable]

    def follows(problem: Problem) -> bool:
        weight = weight_of(problem.name)
        is_alone = weight is not None and find_codes(weight, index.entries) is None  # a scale
        return problem.kind in ("missing", "missing-scale") or (problem.kind == "unused" and is_alone)

    problems = list(problems)
    hidden = [p.name for p in problems if lost and follows(p)]
    if len(hidden) > 1:
        text = f"may hold {len(hidden):,} tensors that are nowhere else ({hidden[0]}, ...): mend it first"
        kept = [p for p in problems if not follows(p)]
        after = 1 + max(i for i, p in enumerate(kept) if p.name == lost[0])
        problems = [*kept[:after], Problem("missing", lost[0], text), *kept[after:]]
    return show_problems(problems, limit)
