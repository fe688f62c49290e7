"""What every rank but the first does: prepare, load and step as rank 0 says, until rank 0 ends.

`python -m saccade.api.loading.rank FD PARENT` is a rank that rank 0 has started on its own machine; `serve_torchrun` is
one that torchrun has started. Nothing heavy is imported before the process is sure to die with its parent.
Next: engine/ranks/replicate.py, the steps.
"""

import os
import signal
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from saccade.parallel.processes import die_with_parent

if TYPE_CHECKING:
    from saccade.api.llm import LLM
    from saccade.api.loading.prepare import PreparedModel
    from saccade.api.push import Push
    from saccade.engine.ranks.replicate import FollowEngine
    from saccade.parallel.follow import Follow
    from saccade.parallel.link import RankMessage
    from saccade.parallel.place import RankPlace


def main() -> NoReturn:
    """Be a rank that rank 0 started."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from saccade.api.settings.threads import sleeping_threads
    from saccade.parallel.follow import Follow
    from saccade.parallel.link import RankLink

    follow = Follow(RankLink(socket.socket(fileno=fd)), parent)
    with sleeping_threads():
        follow_rank_0(follow, "")


def serve_torchrun(place: "RankPlace", options: dict[str, Any]) -> NoReturn:
    """Be a rank that torchrun started, with these options; ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from saccade.api.loading.start_ranks import describe_options, find_store
    from saccade.parallel.follow import Follow
    from saccade.parallel.lead import find_leader

    follow_rank_0(Follow(find_leader(place, find_store())), describe_options(options), place)


def follow_rank_0(follow: "Follow", asked: str, place: "RankPlace | None" = None) -> NoReturn:
    """Do what rank 0 says. The process ends with exit code 0 if it says so, else with 1."""
    from saccade.parallel.link import LinkClosed

    code = 1
    try:
        other = OtherRank(follow, asked, place)
        while other.do(follow.receive()):
            pass
        follow.leave()
        code = 0
    except LinkClosed:
        pass
    except BaseException as error:
        follow.fail(error)
    # Without the interpreter's own end: it would wait for groups whose other ranks are gone.
    os._exit(code)


class OtherRank:
    """A rank, from its first message to its last."""

    def __init__(self, follow: "Follow", asked: str, place: "RankPlace | None") -> None:
        self._follow, self._asked, self._place = follow, asked, place
        self._prepared: PreparedModel | None = None
        self._llm: LLM | None = None
        self._pushing: Push | None = None

    def do(self, message: "RankMessage") -> bool:
        """What a message says; whether there is more to come."""
        told = message.head
        if events := told.get("events"):
            self._engine.enter(events)
        match told["do"]:
            case "step":
                self._step(told["drafts"])
            case "card":
                self._introduce(told)
            case "look":
                self._follow.look_after([(rank, pid) for rank, pid in told["neighbours"]])
            case "prepare":
                self._prepare(told["options"])
            case "fetch":
                self._fetch(told["first"])
            case "load":
                self._load(told)
            case "push":
                self._push(told, message.payload)
            case "end":
                return False
        return True

    def _introduce(self, told: dict[str, Any]) -> None:
        from saccade.parallel.agree import make_card
        from saccade.parallel.memory import make_memory
        from saccade.parallel.place import RankPlace

        if self._place is None:
            self._place = RankPlace(*told["place"])
        self._follow.reply(make_card(self._place.ranks, self._asked, make_memory()))

    def _prepare(self, options: dict[str, Any]) -> None:
        from saccade.api.loading.prepare import prepare
        from saccade.api.loading.start_ranks import describe_prepared

        assert self._place is not None
        self._prepared = prepare(**options, place=self._place)
        self._follow.reply(describe_prepared(self._prepared))

    def _fetch(self, is_first: bool) -> None:
        assert self._prepared is not None and self._place is not None
        if is_first == (self._place.local_rank == 0):
            self._prepared = self._prepared.fetch()
        self._follow.reply({})

    def _load(self, told: dict[str, Any]) -> None:
        from saccade.api.llm import LLM
        from saccade.api.loading.start_ranks import find_store, join_ranks, reach_store, side_by_side
        from saccade.engine.ranks.replicate import FollowEngine

        assert self._prepared is not None
        prepared = self._prepared.with_cache(told["cache_tokens"])
        store = find_store() if told["port"] is None else reach_store(told["port"])
        ranks = join_ranks(store, prepared.plan.layout, prepared.settings.device)
        self._follow.tracker.count_messages = lambda: ranks.traffic.messages
        self._llm = LLM.of(prepared, None, ranks, partial(FollowEngine, ranks), side_by_side(told["side"]))
        self._follow.reply({})

    @property
    def _engine(self) -> "FollowEngine":
        from saccade.engine.ranks.replicate import FollowEngine

        assert self._llm is not None and isinstance(self._llm.engine, FollowEngine)
        return self._llm.engine

    def _step(self, drafts: int) -> None:
        with self._follow.tracker.working():
            self._engine.repeat(drafts)
        if self._engine.failures.are_open:
            with self._follow.tracker.working():
                self._engine.explain_failures()

    def _push(self, told: dict[str, Any], payload: bytes) -> None:
        """What rank 0's Push does."""
        import torch

        from saccade.api.loading.machine import find_free_bytes
        from saccade.api.push import fits_staged, plan_push

        llm = self._llm
        assert llm is not None
        if told["what"] == "plan":
            free = find_free_bytes(llm.settings.device)
            self._follow.reply({"fits": fits_staged(plan_push(llm.plan, told["announced"]), free)})
        elif told["what"] == "open":
            self._pushing = llm.push(told["announced"], told["staged"])
        elif self._pushing is not None and told["what"] == "feed":
            tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(getattr(torch, told["dtype"]))
            self._pushing.feed(told["name"], tensor.reshape(told["shape"]), told["row"])
        elif self._pushing is not None:
            self._pushing.finish() if told["what"] == "finish" else self._pushing.abandon()
            self._pushing = None


if __name__ == "__main__":
    main()
