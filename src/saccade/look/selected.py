"""Which tokens were seen when each token of an answer was chosen, as plain lists: for JSON and for the page.

Knows no engine and no file. Next: page.py; engine/request.py, whose `selections` these are.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Selected = list[list[list[int]]]  # of each token of the answer, by layer: places, ascending
MOST_SELECTED = 1 << 22  # places of one answer as JSON: some 25 MB


class LookedAnswer(NamedTuple):
    """An answer with where it looked."""

    prompt: list[str]  # tokens, as text
    answer: list[str]
    selected: Selected

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def spell_piece(raw: bytes) -> str:
    """A token as text; of a character that several tokens make, its bytes."""
    return raw.decode(errors="backslashreplace")


def list_selected(selections: "Sequence[Tensor] | np.ndarray", prompt: int, answer: int) -> Selected:
    """Of `answer` tokens behind `prompt` ones. A row of `selections` says what its token saw, and chose the next."""
    layers = [rows[prompt - 1 : prompt - 1 + answer].tolist() for rows in selections]
    return [[[place for place in row if place >= 0] for row in rows] for rows in zip(*layers, strict=True)]
