"""What steps need of each running request, in arrays by its slot: its pages, and how its tokens are chosen.

A step takes rows out of them in a few calls of numpy. Rows change where a request enters or gets a page, which of 256
requests four do in a step: to write all of them anew took 2 ms. Next: engine.py, which keeps one; buffers.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saccade.engine.sample import FIELDS, HOW, Row, draw_uniforms

_NO_TARGET = list(Row._fields).index("target")
_UNIFORM = list(Row._fields).index("uniform")


class SlotTable:
    """One row for each slot; slot 0 is nobody's."""

    def __init__(self, requests: int, pages: int) -> None:
        """`pages`: of a request, at most."""
        self.pages: np.ndarray[Any, Any] = np.zeros((requests + 1, pages), dtype=np.int64)
        self._options: np.ndarray[Any, Any] = np.zeros((HOW, requests + 1))
        self._streams: np.ndarray[Any, Any] = np.zeros(requests + 1, dtype=np.uint64)

    def keep(self, slot: int, pages: Sequence[int], options: Sequence[float], stream: int) -> None:
        """What is at a slot now. `options`: the first HOW fields of a `Row`; `stream`: from `find_stream`."""
        held = pages[: self.pages.shape[1]]
        self.pages[slot, : len(held)] = held
        self.pages[slot, len(held) :] = 0
        self._options[:, slot] = options
        self._streams[slot] = stream

    def list_wants(self, slots: Sequence[int], places: Sequence[int], length: int) -> "np.ndarray[Any, Any]":
        """f64 [FIELDS, length], as `list_columns` of sample.py makes them: the next token of each slot, which will be
        at that place of its request; padded with greedy rows."""
        columns = np.zeros((FIELDS, length))
        columns[2] = 1.0  # top_p of padding
        columns[_NO_TARGET] = -1
        at = np.asarray(slots, dtype=np.int64)
        columns[:HOW, : len(at)] = self._options[:, at]
        if columns[0].any():
            columns[_UNIFORM, : len(at)] = draw_uniforms(self._streams[at], np.asarray(places, dtype=np.int64))
        return columns
