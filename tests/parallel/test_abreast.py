"""Ranks of one host that read the same files: none runs ahead of the slowest, and all get their bytes."""

import threading
import time
from pathlib import Path

import pytest
import torch

from saccade.checkpoint.open import bundled_path, open_model
from saccade.checkpoint.read import find_beginnings
from saccade.models.parameters import Layout
from saccade.parallel.abreast import Abreast
from saccade.plan import make_plan
from saccade.weights.loader import load


def share_positions(ranks: int) -> memoryview:
    return memoryview(bytearray(8 * ranks))


def wait_until(positions: list[int], count: int) -> None:
    end = time.monotonic() + 20
    while len(positions) < count:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def test_a_rank_waits_for_the_slowest_and_for_nobody_that_has_ended() -> None:
    memory, reached = share_positions(2), list[int]()
    fast, slow = Abreast(memory, 0, ahead=10), Abreast(memory, 1, ahead=10)

    def read() -> None:
        with fast:
            for position in (0, 10, 11, 500):
                fast.reach(position)
                reached.append(position)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_until(reached, 2)
    assert reached == [0, 10]  # 11 is too far ahead of a rank that has not begun
    with slow:
        slow.reach(1)
        wait_until(reached, 3)
        assert reached == [0, 10, 11]
    thread.join(20)
    assert reached == [0, 10, 11, 500]


@pytest.mark.parametrize("tp, ep", [(2, 1), (4, 4)])
def test_ranks_that_load_side_by_side_hold_what_they_hold_alone(tp: int, ep: int) -> None:
    config, index = open_model(bundled_path())
    plans = [make_plan(config, index, Layout(tp, ep, rank)) for rank in range(tp)]
    memory, loaded = share_positions(tp), dict[int, dict[str, torch.Tensor]]()

    def run(rank: int) -> None:
        loaded[rank] = dict(load(plans[rank], abreast=Abreast(memory, rank, ahead=1 << 20)).held)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank, plan in enumerate(plans):
        alone = load(plan).held
        assert loaded[rank].keys() == alone.keys()
        assert all(torch.equal(loaded[rank][name].view(torch.uint8), alone[name].view(torch.uint8)) for name in alone)


def test_positions_go_on_from_file_to_file() -> None:
    _, index = open_model(bundled_path())
    begins = find_beginnings(index)
    sizes = {path.name: path.stat().st_size for path in Path(index.root).glob("*.safetensors")}
    names = sorted(sizes)
    assert begins == {name: sum(sizes[n] for n in names[:i]) for i, name in enumerate(names)} and len(begins) > 1
