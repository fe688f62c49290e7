"""From the marks of a tensor to findings: what is a problem, what is a note, and what cannot be judged.

A problem means that the model would compute with wrong numbers; a note is worth a look. Texts hold their numbers in the
same places, so that those of 61 layers fold to one line. Next: contents.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from saccade.checkpoint.coding import Coding
from saccade.checkpoint.encoding import Shape
from saccade.checkpoint.index import Entry
from saccade.errors import Problem
from saccade.inspect.blocks import find_beyond, find_used
from saccade.inspect.findings import OUTLIER
from saccade.inspect.scan import FLOAT_BITS, INTEGERS, SCALE_DTYPES, Mark, Marks, median_exponent, merge_marks
from saccade.inspect.stored import Codings, is_scale, read_tensor
from saccade.kernels.codes import NIBBLES

FAR = 59  # binades: codes are below 2^9, so with a scale, or two, they pass 2^127 only if one is beyond 2^59
MAY_BE_ZERO = re.compile(r"(bias|offset|zero_point|zeros)$")


@dataclass
class Judge:
    """Collects what is wrong with tensors of which every byte has been seen."""

    codings: Codings
    scale_fmt: str | None  # what config.json claims
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    suspects: list[tuple[Entry, Marks]] = field(default_factory=list)  # scales to be held against their codes
    extremes: list[Entry] = field(default_factory=list)  # scales, global ones too, that may take a code beyond BF16

    def judge(self, entry: Entry, marks: Marks) -> None:
        name, dtype = entry.name, entry.dtype
        if is_scale(entry):
            if dtype in SCALE_DTYPES or self.codings.find_exponents(entry) is not None:
                self._judge_scale(entry, marks)
            else:
                self.notes.append(Problem("not-judged", name, f"is a scale in {dtype}, which is only read"))
        elif dtype in FLOAT_BITS or dtype in INTEGERS:
            if "not-finite" in marks:
                text = f"numbers that are NaN or infinite: {locate(entry.shape, marks['not-finite'])}"
                self._place_of(entry).append(Problem("not-finite", name, text))
            self._judge_zeros(entry, marks)
        else:
            self.notes.append(Problem("not-judged", name, f"is stored as {dtype}, which is only read"))

    def _judge_zeros(self, entry: Entry, marks: Marks) -> None:
        """All of a tensor may be zero, which is decided by what its codes mean, not by its bytes."""
        name, dtype, shape = entry.name, entry.dtype, list(entry.shape)
        if self.codings.is_offset(entry):  # the loader would say so too
            if "nonzero" in marks:
                text = f"{shape} is not zero, so its codes are asymmetric: get a symmetric conversion"
                self.problems.append(Problem("offset", name, text))
            return
        code = self.codings.find_nibbles(entry)
        if code is not None and "nonzero" in marks and "set" not in marks:
            text = f"{shape} holds nothing but bytes of zero: each number is {NIBBLES[code][0]:g} times its scale"
            self.notes.append(Problem("all-alike", name, text))
        if "nonzero" in marks:
            return
        if code is None and dtype in INTEGERS and dtype != "I8":
            text = f"{shape} holds nothing but bytes of zero; whether that means zero in {dtype} is not known"
            self.notes.append(Problem("not-judged", name, text))
        elif MAY_BE_ZERO.search(name):
            self.notes.append(Problem("all-zero", name, f"{shape} holds nothing but zeros, as it may"))
        else:
            self._place_of(entry).append(Problem("all-zero", name, f"{shape} holds nothing but zeros"))

    def _judge_scale(self, entry: Entry, marks: Marks) -> None:
        found, shape = self._place_of(entry), self._shape_of(entry)
        if "not-finite" in marks:
            text = f"scales that are NaN or infinite: {locate(shape, marks['not-finite'])}"
            found.append(Problem("bad-scale", entry.name, text))
        if "negative" in marks:
            found.append(Problem("bad-scale", entry.name, f"negative scales: {locate(shape, marks['negative'])}"))
        if "rough" in marks and self._is_declared_ue8m0(entry):
            text = f"scales that are no powers of two, of {prod(shape)}: {locate(shape, marks['rough'])}"
            text += "; scale_fmt declares ue8m0, but values are multiplied, so nothing is lost here"
            text += "; engines that pack scales into exponents lose the mantissa"
            self.notes.append(Problem("not-ue8m0", entry.name, text))
        if "zero" in marks or find_outliers(marks):
            self.suspects.append((entry, marks))
        if not self.codings.is_unused(entry) and any(isinstance(e, int) and abs(e) >= FAR for e in marks):
            self.extremes.append(entry)

    def _place_of(self, entry: Entry) -> list[Problem]:
        """Where to tell what is wrong with a tensor: of one that is never used, nothing can be computed wrong."""
        return self.notes if self.codings.is_unused(entry) else self.problems

    def _shape_of(self, entry: Entry) -> Shape:
        """That of its scales; the file's shape if it has an element for each."""
        return self.codings.find_exponents(entry) or entry.shape

    def _is_declared_ue8m0(self, entry: Entry) -> bool:
        """Whether the config promises that this scale holds powers of two. It speaks of FP8 weights, not of others."""
        codes = self.codings.find_scaled(entry)
        return codes is not None and codes.dtype == "F8_E4M3" and (self.scale_fmt or "").lower() == "ue8m0"

    def judge_suspects(self) -> None:
        """Name zero scales and outliers, unless nothing but zeros lies under them. Reads those codes."""
        for entry, marks in self.suspects:
            median, note, shape = median_exponent(marks) or 0, "", self._shape_of(entry)
            pair, codes = self.codings.find_pair(entry), self.codings.find_scaled(entry)
            found: Mapping[str | int, Mark | None]
            if pair is not None:
                found = find_used(self.codings.index, pair, 2.0 ** (median - OUTLIER), 2.0 ** (median + OUTLIER + 1))
            else:
                found = {"zero": marks.get("zero"), "outlier": find_outliers(marks)}
                if codes is not None and not self.codings.is_global(entry):  # which scales every code alike
                    how = self.codings.name_of(codes)
                    note = f"; whether the {how} codes under them are zero is not known"
            zero, outlier = found.get("zero"), found.get("outlier")
            if zero is not None:
                problem = Problem("bad-scale", entry.name, f"zero scales: {locate(shape, zero)}{note}")
                (self.notes if note else self._place_of(entry)).append(problem)
            if outlier is not None:
                text = f"scales farther than 2^{OUTLIER} from the median 2^{median}: {locate(shape, outlier)}"
                self.notes.append(Problem("outlier", entry.name, text + note))
        self._judge_extremes()

    def _judge_extremes(self) -> None:
        """Name codes that their scales take beyond the range of BF16, in which most of a model is held. Reads them."""
        index = self.codings.index
        accused = {problem.name for problem in self.problems}
        for coding in {c.codes: c for c in map(self.codings.find, self.extremes) if isinstance(c, Coding)}.values():
            pair = self.codings.find_pair(index.entries[coding.codes])
            if pair is None or coding.global_scale in accused:
                continue
            second = None if coding.global_scale is None else read_tensor(index, coding.global_scale).view(1, 1)
            beyond = find_beyond(index, pair, second)
            if beyond is not None:
                text = f"exceeds the range of BF16 under some of its scales: {locate(pair.grid, beyond)}"
                self.problems.append(Problem("not-finite", coding.codes, text))


def find_outliers(marks: Marks) -> Mark | None:
    """The scales whose binade is farther than OUTLIER from the median's."""
    median = median_exponent(marks)
    outliers: Marks = {}
    for e, mark in marks.items():
        if isinstance(e, int) and median is not None and abs(e - median) > OUTLIER:
            merge_marks(outliers, {"": mark})
    return outliers.get("")


def locate(shape: Shape, mark: Mark) -> str:
    """`3, first at [0, 17]`"""
    at = [int(i) for i in np.unravel_index(mark.first, shape)] if shape else []
    return f"{mark.total}, first at {at}" if at else str(mark.total)
