"""What all ranks must have in common before anything is read: how many they are, versions, checkpoint, devices.

A card is what a rank says about itself, a JSON object. The first rank that differs from rank 0 is refused by name.
Knows no models: a plan is a hash here. Next: api/loading/start_ranks.py asks for the cards.
"""

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from saccade import __version__
from saccade.base.printable import escape
from saccade.errors import RankError
from saccade.parallel.processes import find_machine, read_start_time

RankCard = Mapping[str, Any]
CURES = {  # what must be equal -> how it is called, and the likely cure
    "ranks": ("was started as one of {} ranks", "start all with the same command"),
    "saccade": ("runs saccade {}", "install one version everywhere"),
    "torch": ("runs torch {}", "install one version everywhere"),
    "python": ("runs Python {}", "install one version everywhere"),
    "asked": ("was started with {}", "start all with the same command"),
    "kind": ("computes on {}", "use machines of one kind"),
    "max_mixed_tokens": ("would mix {} tokens in a step", "set max_mixed_tokens"),
    "checkpoint": ("sees a checkpoint with the hash {}", "copy the same files to every machine"),
}


def make_card(ranks: int, asked: str, memory: int) -> dict[str, Any]:
    """This process; `asked`: the options of the model that it was started with, "" for one that rank 0 started;
    `memory`: a descriptor of memory that others of this machine may share."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    return {
        "ranks": ranks, "saccade": __version__, "torch": torch, "python": platform.python_version(), "asked": asked,
        "host": socket.gethostname(), "pid": os.getpid(), "start": read_start_time(os.getpid()),
        "machine": find_machine(), "memory": memory,
    }  # fmt: skip


def find_neighbours(cards: Sequence[RankCard], rank: int) -> list[int]:
    """The ranks of a rank's machine, itself included; the first of them speaks for the machine."""
    machine = cards[rank]["machine"]
    return [r for r, card in enumerate(cards) if r == rank or (machine and card["machine"] == machine)]


def require_equal(cards: Sequence[RankCard]) -> None:
    """RankError for the first rank whose card says something else than rank 0's."""
    first = cards[0]
    for rank, card in enumerate(cards):
        for key, (says, cure) in CURES.items():
            if key in first and card.get(key) != first[key]:
                mine, its = (says.format(escape(str(each.get(key)))) for each in (first, card))
                raise RankError(f"rank {rank} on {card.get('host') or first.get('host')} {its}, rank 0 {mine}: {cure}")
