"""What was loaded: parameters on a device, each handed out once, and how exactly they became what they are.

Knows no files and no plan's steps. Next: loader.py fills them, models take them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from saccade.errors import LoadError
from saccade.kernels.types import Matrix
from saccade.plan.fold import fold
from saccade.plan.types import Stored


class Rounding(NamedTuple):
    """How exactly a tensor became BF16. 0.0 means bit for bit: codes times power-of-two scales always are."""

    tensor: str
    largest: float  # relative to the exact value; at most 2**-8 of it, half a unit in BF16's last place


class Weights:
    """Loaded parameters, each to be taken once."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        roundings: Iterable[Rounding] = (),
        kept: Mapping[str, Stored] | None = None,
    ):
        """`kept`: of the matrices kept as codes, what they are."""
        self.held = dict(tensors)  # all of them, taken or not: a push writes there
        self._tensors = dict(tensors)
        self._kept = dict(kept or {})
        self._taken: set[str] = set()
        self.roundings = tuple(roundings)

    def names(self) -> list[str]:
        """What has not been taken yet."""
        return list(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        """The parameter `name`, which nobody else can take any more."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            why = "was taken before" if name in self._taken else "was not loaded"
            raise LoadError(f"parameter {name} {why}; the model and its family's parameters.py disagree")
        self._taken.add(name)
        return tensor

    def matrix(self, name: str) -> Matrix:
        """The matrix `name`, as it is stored: plain, or codes with their scales."""
        data, kept = self.take(name), self._kept.get(name)
        if kept is None or kept.encoding is None or kept.group is None:
            return Matrix(data)
        scale = self.take(name + ".scale")
        second = self.take(name + ".global_scale") if self.has(name + ".global_scale") else None
        return Matrix(data, scale, kept.group, kept.encoding.code, second, kept.encoding.divides)

    def finish(self) -> None:
        """Refuse parameters that were loaded and never taken."""
        if self._tensors:
            raise LoadError("loaded but never used: " + "; ".join(fold(self._tensors)))
