"""The ranks of one LLM, started and agreed, seen from rank 0.

Rank 0 starts the others, or meets those that torchrun started. All prepare the same model and say what they see; what
must be equal is compared before a byte of weights is read, and the cache is as large as the rank with the least memory
allows. Then all join one process group and load their shares. Next: rank.py, what the others do.
"""

import hashlib
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from saccade.api.loading.prepare import PreparedModel
from saccade.errors import RankError
from saccade.models.parameters import Layout
from saccade.models.registry import fetch_place
from saccade.parallel.abreast import Abreast
from saccade.parallel.agree import RankCard, find_neighbours, make_card, require_equal
from saccade.parallel.distributed import DistributedRanks, join_gloo
from saccade.parallel.lead import ADDRESS, Lead
from saccade.parallel.memory import make_memory, open_memory
from saccade.plan import Plan

MODULE = "saccade.api.loading.rank"
ON_GPUS = "saccade.parallel.device:join_devices"  # imports Triton
# Of a collective. A rank that is gone or hangs ends all of them far sooner; one that compiles may take minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


@dataclass
class Started:
    """All ranks have agreed; next each loads."""

    lead: Lead
    store: Store
    cache_tokens: int
    cards: list[RankCard]

    def join(self, prepared: PreparedModel) -> tuple[PreparedModel, DistributedRanks]:
        """Have all ranks load, and join their group; the model of rank 0 with the cache that all agreed on."""
        store, layout = self.store, prepared.plan.layout
        port = store.port if isinstance(store, TCPStore) and prepared.place.is_own else None
        told = [{"do": "load", "cache_tokens": self.cache_tokens, "port": port, "side": s} for s in self._list_sides()]
        self.lead.tell_each(told[1:])
        ranks = join_ranks(store, layout, prepared.settings.device)
        self.lead.tracker.count_messages = lambda: ranks.traffic.messages
        self.lead.watch.release = partial(leave_group, ranks)
        return prepared.with_cache(self.cache_tokens), ranks

    def read_abreast(self) -> Abreast | None:
        return side_by_side(self._list_sides()[0])

    def settle(self) -> None:
        """All have loaded: what they shared for it goes."""
        self.lead.collect()
        os.close(self.cards[0]["memory"])

    def _list_sides(self) -> list[list[int]]:
        """For each rank: process and descriptor of the memory of its machine, and which of that machine's it is."""
        sides = []
        for rank in range(len(self.cards)):
            near = find_neighbours(self.cards, rank)
            sides.append([self.cards[near[0]]["pid"], self.cards[near[0]]["memory"], near.index(rank), len(near)])
        return sides


def side_by_side(side: Sequence[int]) -> Abreast | None:
    """How the ranks of one machine read the same files; None for a rank that is alone there."""
    pid, memory, index, count = side
    shared = open_memory((pid, memory)) if count > 1 else None
    return None if shared is None else Abreast(memoryview(shared)[: 8 * count], index)


def start_ranks(prepared: PreparedModel) -> Started:
    """Start the other ranks of a model whose weights are on this machine, and let all agree. RankError if they cannot
    begin together; then all have ended."""
    place, lead = prepared.place, Lead()
    try:
        if place.is_own:
            store: Store = make_store()
            lead.start_local(place.ranks, MODULE)
        else:
            store = find_store()
            if store.check([ADDRESS]):
                raise RankError("the ranks that torchrun started have served a model already: start them again")
            lead.meet(place, store, os.environ["MASTER_ADDR"])
        with lead.together("the start"):
            return Started(lead, store, *agree(lead, prepared))
    except BaseException:
        lead.close()
        raise


def agree(lead: Lead, prepared: PreparedModel) -> tuple[int, list[RankCard]]:
    """Have all ranks prepare, and compare what they say: the tokens of the cache that all have memory for, and who the
    ranks are."""
    place, asked = prepared.place, "" if prepared.place.is_own else describe_options(prepared.options)
    firsts = [{"do": "card", "place": place._replace(rank=p.rank, local_rank=p.rank)} for p in lead.peers]
    lead.tell_each(firsts if place.is_own else [{"do": "card"}] * len(lead.peers))
    cards: list[RankCard] = [make_card(place.ranks, asked, make_memory()), *(reply.head for reply in lead.collect())]
    introduce(lead, cards)
    require_equal(cards)
    # The weights of an id have been fetched; torch's number of threads may be set in this process alone.
    path = {"path": str(prepared.source.root), "threads": prepared.settings.threads} if place.is_own else {}
    seen = [reply.head for reply in lead.ask({"do": "prepare", "options": prepared.options | path})]
    if not place.is_own:
        for is_first in (True, False):  # one rank of each machine fetches what is missing there
            lead.ask({"do": "fetch", "first": is_first})
    hosts = [{"host": card["host"]} for card in cards]
    own = describe_prepared(prepared)
    require_equal([{**each, **host} for each, host in zip([own, *seen], hosts, strict=True)])
    return min(each["cache_tokens"] for each in (own, *seen)), cards


def introduce(lead: Lead, cards: list[RankCard]) -> None:
    """Let the watch know who the others are, and those of other machines look after each other."""
    orders = []
    for peer, card in zip(lead.peers, cards[1:], strict=True):
        peer.host, peer.pid, peer.start = str(card["host"]), int(card["pid"]), str(card["start"])
        near = find_neighbours(cards, peer.rank)
        peer.is_near, peer.is_alone = near[0] == 0, near == [peer.rank]
        others = [] if peer.is_near else [(rank, cards[rank]["pid"]) for rank in near if rank != peer.rank]
        orders.append({"do": "look", "neighbours": others})
    lead.tell_each(orders)


def join_ranks(store: Store, layout: Layout, device: str) -> DistributedRanks:
    """The process group of all ranks."""
    if device == "cpu":
        return DistributedRanks(layout, join_gloo(store, layout, COLLECTIVE_TIMEOUT))
    ranks: DistributedRanks = fetch_place(ON_GPUS)(store, layout, torch.device(device), COLLECTIVE_TIMEOUT)
    return ranks


def leave_group(ranks: DistributedRanks) -> None:
    """End what waits in NCCL for ranks that are gone, and NCCL's threads. Of gloo the sockets end by themselves."""
    group: Any = getattr(ranks, "group", None)
    if group is not None and getattr(ranks, "device", torch.device("cpu")).type == "cuda":
        with suppress(RuntimeError, AttributeError):
            group.abort()


def make_store() -> TCPStore:
    """Where the ranks of this machine meet, at a free port."""
    return TCPStore("127.0.0.1", 0, None, True, timedelta(minutes=5), wait_for_workers=False)


def reach_store(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, None, False, timedelta(minutes=5), wait_for_workers=False)


def find_store() -> Store:
    """torchrun's."""
    try:
        meeting = dist.rendezvous("env://")  # type: ignore[attr-defined]
        return next(iter(meeting))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(f"the store of torchrun cannot be reached from {socket.gethostname()}: {error}") from None


def checking(lead: Lead, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
    """`progress`, that also ends a load in which another rank is gone."""

    def note(done: int, total: int) -> None:
        lead.check()
        if progress is not None:
            progress(done, total)

    return note


def describe_options(options: dict[str, Any]) -> str:
    """Options of a model as they may have been typed: those that are set."""
    told = [f"{name}={value}" for name, value in options.items() if value is not None]
    return " ".join(told)


def describe_prepared(prepared: PreparedModel) -> dict[str, Any]:
    """What a rank sees of a model."""
    s = prepared.settings
    is_gpu = s.device.startswith("cuda")
    return {
        "kind": torch.cuda.get_device_name(s.device) if is_gpu else "a CPU",
        "checkpoint": hash_plan(prepared.plan),
        "cache_tokens": s.cache_tokens,
        "max_mixed_tokens": s.max_mixed_tokens,
    }


def hash_plan(plan: Plan) -> str:
    """Config, headers and layout of all ranks, as 16 digits. A rank differs from another one in these alone by what
    lies in its files."""
    found = hashlib.sha256(repr((plan.config, plan.layout.tp, plan.layout.ep, plan.dtype, plan.mtp)).encode())
    for name, entry in sorted(plan.index.entries.items()):
        found.update(f"{name} {entry.dtype} {entry.shape} {entry.file} {entry.start} {entry.stop}\n".encode())
    return found.hexdigest()[:16]
