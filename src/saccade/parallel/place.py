"""Which rank this process is, and of how many: told by torchrun's variables, or by rank 0 that started it.

Knows no torch. Next: lead.py meets the others.
"""

from collections.abc import Mapping
from typing import NamedTuple

from saccade.base.values import show
from saccade.errors import RankError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_FOR_CHILDREN = (*VARIABLES, "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE")


class RankPlace(NamedTuple):
    """A rank among all, and among those of its machine."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    is_own: bool = True  # rank 0 starts the others, and not torchrun


def choose_place(tp: int, environment: Mapping[str, str]) -> RankPlace:
    """Of `tp` ranks: torchrun's, if it started this process and there are several; else rank 0 of this machine's."""
    place = find_place(environment)
    if place is None or tp == 1:
        return RankPlace(0, tp, 0, tp)
    require_ranks(place, tp)
    return place


def find_place(environment: Mapping[str, str]) -> RankPlace | None:
    """The place that torchrun gave this process; None where it did not start it. RankError for senseless variables."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    numbers = list[int]()
    for name in VARIABLES[:4]:
        text = environment.get(name, "")
        if not text.isdecimal():
            raise RankError(f"{name}: expected a number, as torchrun sets it, found {show(text)}")
        numbers.append(int(text))
    place = RankPlace(numbers[0], numbers[1], numbers[2], numbers[3], is_own=False)
    if not (place.rank < place.ranks and place.local_rank < place.local_ranks <= place.ranks):
        raise RankError(
            f"torchrun's variables contradict each other: {show(dict(zip(VARIABLES, numbers, strict=False)))}"
        )
    if not environment.get("MASTER_ADDR") or not environment.get("MASTER_PORT", "").isdecimal():
        raise RankError("MASTER_ADDR and MASTER_PORT: expected where the ranks meet, as torchrun sets them")
    return place


def is_other_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun started this process as another rank than 0, which says all there is to say."""
    return "LOCAL_RANK" in environment and environment.get("RANK", "0") != "0"


def require_ranks(place: RankPlace, tp: int) -> None:
    """RankError unless torchrun started as many ranks as share the model."""
    if place.ranks != tp:
        raise RankError(
            f"torchrun started {place.ranks} ranks, but {tp} share the model: say tp={place.ranks} (--tp"
            f" {place.ranks}), or start {tp}"
        )
