"""From the marks of a tensor to findings: what is a problem, what is a note, and what cannot be judged.

A problem means that the model would compute with wrong numbers; a note is worth a look. Texts hold their numbers in the
same places, so that those of 61 layers fold to one line. Next: contents.py.
"""

import re
from dataclasses import dataclass, field
from math import prod

import numpy as np

from saccade.checkpoint.index import Entry, Index
from saccade.errors import Problem
from saccade.inspect.blocks import find_used
from saccade.inspect.findings import OUTLIER
from saccade.inspect.scan import FLOATS, INTEGERS, SCALES, Mark, Marks, median_exponent, merge
from saccade.inspect.stored import find_codes, find_pair, is_global, name_encoding

SCALE_NAME = re.compile(r"_scale(_inv|_\d)?$")  # weight_scale_2, weight_global_scale, input_scale
MAY_BE_ZERO = re.compile(r"(bias|offset|zero_point|zeros)$")


@dataclass
class Judge:
    """Collects what is wrong with tensors of which every byte has been seen."""

    index: Index
    scale_fmt: str | None  # what config.json claims
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    suspects: list[tuple[Entry, Marks]] = field(default_factory=list)  # scales to be held against their codes

    def judge(self, entry: Entry, marks: Marks) -> None:
        name, dtype, shape = entry.name, entry.dtype, list(entry.shape)
        if dtype not in (SCALES if is_scale(entry) else FLOATS | INTEGERS):
            self.notes.append(Problem("not-judged", name, f"is stored as {dtype}, which is only read"))
        elif is_scale(entry):
            self._judge_scale(entry, marks)
        else:
            if "not-finite" in marks:
                text = f"numbers that are NaN or infinite: {locate(entry, marks['not-finite'])}"
                self.problems.append(Problem("not-finite", name, text))
            if "nonzero" in marks:
                return
            if dtype in FLOATS or dtype == "I8":
                may_be = MAY_BE_ZERO.search(name) is not None
                found = Problem(
                    "all-zero", name, f"{shape} holds nothing but zeros" + (", as it may" if may_be else "")
                )
                (self.notes if may_be else self.problems).append(found)
            else:
                text = f"{shape} holds nothing but bytes of zero; whether that means zero in {dtype} is not known"
                self.notes.append(Problem("not-judged", name, text))

    def _judge_scale(self, entry: Entry, marks: Marks) -> None:
        if "not-finite" in marks:
            text = f"scales that are NaN or infinite: {locate(entry, marks['not-finite'])}"
            self.problems.append(Problem("bad-scale", entry.name, text))
        if "negative" in marks:
            self.problems.append(
                Problem("bad-scale", entry.name, f"negative scales: {locate(entry, marks['negative'])}")
            )
        if "rough" in marks and self._is_declared_ue8m0(entry):
            text = f"scales that are no powers of two, of {prod(entry.shape)}: {locate(entry, marks['rough'])}"
            text += "; scale_fmt declares ue8m0, but values are multiplied, so nothing is lost"
            self.notes.append(Problem("not-ue8m0", entry.name, text))
        if "zero" in marks or find_outliers(marks):
            self.suspects.append((entry, marks))

    def _is_declared_ue8m0(self, entry: Entry) -> bool:
        """Whether the config promises that this scale holds powers of two. It speaks of FP8 weights, not of others."""
        codes = find_codes(self.index, entry)
        return codes is not None and codes.dtype == "F8_E4M3" and (self.scale_fmt or "").lower() == "ue8m0"

    def judge_suspects(self) -> None:
        """Name zero scales and outliers, unless nothing but zeros lies under them. Reads those codes."""
        for entry, marks in self.suspects:
            median, note = median_exponent(marks) or 0, ""
            pair, codes = find_pair(self.index, entry), find_codes(self.index, entry)
            if pair is not None:
                found = find_used(self.index, pair, 2.0 ** (median - OUTLIER), 2.0 ** (median + OUTLIER + 1))
            else:
                sorts = (("zero", marks.get("zero")), ("outlier", find_outliers(marks)))
                found = {sort: mark for sort, mark in sorts if mark is not None}
                if codes is not None and not is_global(self.index, entry):  # which scales every code alike
                    how = name_encoding(self.index, codes)
                    note = f"; whether the {how} codes under them are zero is not known"
            if "zero" in found:
                problem = Problem("bad-scale", entry.name, f"zero scales: {locate(entry, found['zero'])}{note}")
                (self.notes if note else self.problems).append(problem)
            if "outlier" in found:
                text = f"scales farther than 2^{OUTLIER} from the median 2^{median}: {locate(entry, found['outlier'])}"
                self.notes.append(Problem("outlier", entry.name, text + note))


def is_scale(entry: Entry) -> bool:
    """Whether a tensor is a scale, which its name says: weight_scale_inv, weight_scale_2, input_scale."""
    return SCALE_NAME.search(entry.name) is not None


def find_outliers(marks: Marks) -> Mark | None:
    """The scales whose binade is farther than OUTLIER from the median's."""
    median = median_exponent(marks)
    outliers: Marks = {}
    for e, mark in marks.items():
        if isinstance(e, int) and median is not None and abs(e - median) > OUTLIER:
            merge(outliers, {"": mark})
    return outliers.get("")


def locate(entry: Entry, mark: Mark) -> str:
    """`3, first at [0, 17]`"""
    at = [int(i) for i in np.unravel_index(mark.first, entry.shape)] if entry.shape else []
    return f"{mark.total}, first at {at}" if at else str(mark.total)
