"""Benchmarks of what does not fit in memory: it is left out, with one line that says why, and the rest is measured."""

import json
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saccade.bench import rig, room
from saccade.bench.__main__ import main
from saccade.bench.room import left_out, require_room
from saccade.bench.shapes import find_shape
from saccade.bench.steps.clients import TrafficTask
from saccade.bench.steps.decode import How, measure_decode
from saccade.bench.steps.prefill import PrefillHow, measure_prefill
from saccade.bench.steps.traffic import build_engine
from saccade.engine.pages import allocate_cache, count_cache_bytes, count_page_bytes, shape_cache
from saccade.errors import MemoryRefusedError, RequestError
from saccade.models.parameters import Layout
from saccade.parallel.ranks import ONE_RANK, OneRank

CPU = torch.device("cpu")
SMALL = ["--shape", "bundled", "--layers", "1", "--device", "cpu"]
# A line that measures two cases, and the option by which the second is larger.
LINES = {
    "decode": ["--batch", "1,40", "--context", "64", "--steps", "1", "--repeats", "1", "--random-cache"],
    "prefill": ["--context", "8,2000", "--repeats", "1"],
    "engine": ["--clients", "1,40", "--prompt", "3", "--output", "2"],
    "chunks": ["--chunk", "64,2", "--decodes", "1", "--context", "200", "--repeats", "1"],
}
CASES = {
    "decode": "batch 40 at context 64",
    "prefill": "2000 tokens",
    "engine": "40 clients",
    "chunks": "steps of 2 tokens",
}


class Killed(OneRank):
    """One of two ranks, of which the other has no room."""

    layout = Layout(2, 1, 0)

    def collect(self, text: str) -> list[str]:
        return [text, "no"]


def test_a_cache_that_does_not_fit_on_one_rank_fits_on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "count_free", lambda _: 10_000_000_000)
    require_room(9.4e9, CPU)
    with pytest.raises(MemoryRefusedError, match=r"its cache needs 9.6 GB; 10.0 GB are free"):
        require_room(9.6e9, CPU)
    with pytest.raises(MemoryRefusedError):
        require_room(1.0, CPU, Killed())


def test_what_an_allocator_refuses_is_left_out_and_its_tensors_are_gone() -> None:
    said, kept = list[str](), list["weakref.ref[torch.Tensor]"]()

    def fail(error: Exception) -> None:
        held = torch.zeros(3)
        kept.append(weakref.ref(held))
        raise error

    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB")
    with left_out("batch 9", CPU, said.append):
        fail(oom)
    assert kept[0]() is None  # though the error is still at hand
    assert said == ["left out: batch 9: it does not fit in memory (CUDA out of memory)"]
    with pytest.raises(RequestError, match="batch 9: it does not fit"), left_out("batch 9", CPU, said.append, Killed()):
        fail(oom)
    with pytest.raises(RuntimeError, match="another"), left_out("batch 9", CPU, said.append):
        fail(RuntimeError("another"))
    with left_out("batch 8", CPU, said.append):
        try:
            fail(oom)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    assert said.pop() == "left out: batch 8: it does not fit in memory (CUDA out of memory)"
    with pytest.raises(RequestError, match="one rank"), left_out("batch 9", CPU, said.append):
        raise RequestError("one rank")
    assert len(said) == 1


@pytest.mark.parametrize("command", LINES)
def test_a_case_that_does_not_fit_leaves_the_others(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the estimate: there is room for eight pages, then for none."""
    page = count_page_bytes(find_shape("bundled", 1).config, "auto", False)
    monkeypatch.setattr(room, "count_free", lambda _: int(8.5 * page / room.CACHE_ROOM))
    line = [command, *SMALL, *LINES[command]]
    assert main([*line, "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 1
    assert [text for text in err.splitlines() if text.startswith("left out")] == [
        f"left out: {CASES[command]}: its cache needs 0.0 GB; 0.0 GB are free"
    ]
    monkeypatch.setattr(room, "count_free", lambda _: 0)
    assert main(line) == 2
    out, err = capsys.readouterr()
    *left, last = err.splitlines()
    assert out == "" and [text[:8] for text in left] == ["left out"] * 2
    assert last.startswith("saccade: nothing was measured: nothing that was asked for fits in memory")


@pytest.mark.parametrize(
    ("measure", "pages", "requests"),
    [
        (
            lambda it: measure_decode(it, ["packed"], 3, 128, How(1, 1, False, "bf16", "bf16", None, [], print), False),
            7,
            3,
        ),
        (lambda it: measure_prefill(it, ["packed"], 128, PrefillHow(64, 1, None, print)), 3, 1),
        (lambda it: build_engine(it, 3, TrafficTask(64, 64, 64), 7), 7, 3),
    ],
    ids=["decode", "prefill", "engine"],
)
def test_states_need_room_beside_pages(
    measure: Callable[[Any], object], pages: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of GLM-5.3-Flash: nothing is allocated where pages fit, and states do not."""
    shape = find_shape("glm5-next-rank-of-8", 5, with_flash=True)
    cache = allocate_cache(shape.config, pages, "auto", "cpu", False, requests=requests)
    pools = [p for latent in cache.latent for p in latent if p is not None]
    pools += [keys.data for keys in cache.index_keys if keys is not None]
    states = sum(state.nbytes for layer in cache.states for state in layer.values())
    needed = count_cache_bytes(shape_cache(shape.config, pages, "auto", False, requests=requests))
    assert needed == sum(p.nbytes for p in pools) + states and states > 0
    monkeypatch.setattr(room, "count_free", lambda _: int((needed - 1) / room.CACHE_ROOM))
    given = SimpleNamespace(
        shape=shape, device=CPU, plan=SimpleNamespace(dtype="auto"), ranks=ONE_RANK, make_runner=lambda *_: (None, 0)
    )
    with pytest.raises(MemoryRefusedError, match="its cache needs"):
        measure(given)


@pytest.mark.parametrize(
    ("command", "name", "options", "case"),
    [
        ("decode", "saccade.bench.steps.decode.allocate_cache", [*SMALL, *LINES["decode"]], "batch 1 at context 64"),
        ("prefill", "saccade.bench.steps.prefill.allocate_cache", [*SMALL, *LINES["prefill"]], "8 tokens"),
        ("engine", "saccade.bench.steps.traffic.allocate_cache", [*SMALL, *LINES["engine"]], "1 client"),
        ("chunks", "saccade.bench.steps.traffic.allocate_cache", [*SMALL, *LINES["chunks"]], "steps of 64 tokens"),
        ("host", "saccade.bench.steps.host.NoModel", ["--device", "cpu", "--clients", "1,2"], "1 client"),
        (
            "indexer",
            "saccade.bench.projection.operation.make_operands",
            ["--device", "cpu", "--batch", "1,2"],
            "batch 1",
        ),
    ],
)
def test_what_an_allocator_refuses_is_said_by_each_command(
    command: str,
    name: str,
    options: list[str],
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(name, refuse)
    assert main([command, *options]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 3
    assert lines[0] == f"left out: {case}: it does not fit in memory (CUDA out of memory)"


def test_weights_that_do_not_fit_end_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig, "count_free", lambda _: 50_000)
    for command in LINES:
        assert main([command, *SMALL, "--context" if command != "engine" else "--prompt", "70"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "bundled needs 0.0 GB for weights; 0.0 GB are free" in err
