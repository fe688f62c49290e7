"""Bytes on their way to a device that copies late: no buffer is written again before its copy has ended.

The device here is a fake that copies when it is waited for, and not before; the real one is in test_gpu.py.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from small_checkpoints import small_config, small_tensors, write_small
from torch import Tensor

from saccade.checkpoint.index import Index, read_index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.checkpoint.staging import BUFFERS, Card, Event, Staging, memory_for
from saccade.models.dsa.config import ModelConfig
from saccade.plan import make_plan
from saccade.weights.loader import load


class LateCard:
    """Of one thread. What it was sent arrives when somebody waits for it."""

    def __init__(self, log: list["LateCard"]):
        self.queue: list[tuple[Tensor, Tensor]] = []  # (where it goes, the pinned bytes)
        self.pinned: list[Tensor] = []
        self.most_on_the_way = 0
        log.append(self)

    def pin(self, size: int) -> Tensor:
        self.pinned.append(torch.zeros(size, dtype=torch.uint8))
        return self.pinned[-1]

    def send(self, held: Tensor) -> Tensor:
        arrived = torch.full_like(held, 0xEE)
        self.queue.append((arrived, held))
        self.most_on_the_way = max(self.most_on_the_way, len(self.queue))
        return arrived

    def record(self) -> Event:
        return LateEvent(self, self.queue[-1][0])


class LateEvent:
    def __init__(self, card: LateCard, last: Tensor):
        self.card, self.last = card, last

    def synchronize(self) -> None:
        while any(arrived is self.last for arrived, _ in self.card.queue):
            arrived, held = self.card.queue.pop(0)
            arrived.copy_(held)


class WatchfulCard(LateCard):
    """Copies at once, as a stream seems to do to whoever works on it, and then sees to it that the bytes stay."""

    def send(self, held: Tensor) -> Tensor:
        super().send(held)
        self.queue[-1] = (held.clone(), held)
        return self.queue[-1][0]

    def record(self) -> Event:
        return WatchfulEvent(self, self.queue[-1][0])


class WatchfulEvent(LateEvent):
    def synchronize(self) -> None:
        while any(arrived is self.last for arrived, _ in self.card.queue):
            arrived, held = self.card.queue.pop(0)
            assert arrived.equal(held), "a buffer was written while the device still read it"


def stage(log: list[LateCard], card: Callable[[list[LateCard]], Card], size: int) -> Staging:
    return Staging(size, card(log))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = small_tensors(small_config(), power_of_two=False)
    return write_small(tmp_path_factory.mktemp("small"), small_config(), tensors, shard_of=lambda n: len(n) % 3)


def whole(index: Index) -> list[RowRange]:
    return [RowRange(n, 0, e.shape[0] if e.shape else 1) for n, e in index.entries.items()]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_arrives_late_is_what_stands_in_the_files(root: Path, threads: int) -> None:
    index, log, lock = read_index(root), list[LateCard](), threading.Lock()
    kept: dict[tuple[str, int], Tensor] = {}
    expected: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, rows: Tensor, first: int) -> None:
        with lock:
            kept[name, first] = rows  # no copy: it has not arrived

    read_rows(index, whole(index), keep, threads, 4000, memory=partial(stage, log, LateCard))
    read_rows(index, whole(index), lambda n, t, i: expected.update({(n, i): t.clone()}), 1, 4000)
    assert kept.keys() == expected.keys() and len(kept) > 100
    wrong = [key for key, rows in kept.items() if bytes_of(rows) != bytes_of(expected[key])]
    assert not wrong
    assert not any(card.queue for card in log)  # closing waited for the last


def bytes_of(rows: Tensor) -> list[int]:
    numbers: list[int] = rows.flatten().view(torch.uint8).tolist()
    return numbers


def test_reading_goes_on_while_a_copy_is_under_way_and_memory_is_two_buffers(root: Path) -> None:
    log: list[LateCard] = []
    read_rows(read_index(root), whole(read_index(root)), lambda *_: None, 1, 4000, memory=partial(stage, log, LateCard))
    (card,) = log
    assert card.most_on_the_way == len(card.pinned) == BUFFERS == 2
    assert all(len(held) <= 4000 for held in card.pinned)


def test_after_an_error_nothing_is_still_on_the_way(root: Path) -> None:
    log: list[LateCard] = []

    def fail(name: str, rows: Tensor, first: int) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        read_rows(read_index(root), whole(read_index(root)), fail, 1, 4000, memory=partial(stage, log, LateCard))
    assert log[0].most_on_the_way == 1 and not log[0].queue


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_staged_parameters_are_those_of_the_cpu_bit_for_bit(
    root: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(ModelConfig.load(root), read_index(root), dtype=dtype)
    expected, log = load(plan).held, list[LateCard]()
    monkeypatch.setattr("saccade.weights.loader.memory_for", lambda _: partial(stage, log, WatchfulCard))
    found = load(plan, threads=1).held  # so that each buffer is used more than once
    assert found.keys() == expected.keys() and len(log) == 2  # scales first, then the rest
    assert all(found[name].view(torch.uint8).equal(tensor.view(torch.uint8)) for name, tensor in expected.items())


def test_only_a_gpu_is_staged_for() -> None:
    assert not isinstance(memory_for(torch.device("cpu"))(10), Staging)
