"""Kernels that processes compile beside a start: which, by whom, and how it ends. In processes of their own: here,
kernels are interpreted."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saccade.api.compiling import beside
from saccade.api.compiling.beside import Compiling, compile_beside, start_unless_compiled
from saccade.api.compiling.folder import OwnFolder, remove_left
from saccade.api.compiling.meta_model import MetaShape, MetaStep, count_unlike_layers, forget_sizes, group_steps
from saccade.api.compiling.order import Order, count_processes, hash_order, is_compiled
from saccade.api.loading.prepare import prepare
from saccade.base import disk
from saccade.bench.shapes import find_shape
from saccade.bench.steps.start import bench_start
from saccade.bench.synthetic import plan_weights
from saccade.errors import RequestError
from saccade.parallel.processes import read_state

TOY = """
import os, time
import torch, triton, triton.language as tl

@triton.jit
def fill(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)

def open_fill(shape):
    x = torch.empty(64, device="meta")
    def run(n):
        if n < 0:
            raise ValueError("no such step")
        fill[(1,)](x, n, num_warps=1)
    return run

def open_never(shape):
    open(os.path.join(os.environ["PYTHONPATH"].split(":")[-1], "begun"), "w").close()
    time.sleep(600)
"""
FILL, NEVER = "toy_kernels:open_fill", "toy_kernels:open_never"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache of processes that find toy kernels."""
    (tmp_path / "toy_kernels.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_toy(groups: Any, place: str = FILL, stamp: str = "") -> Order:
    return Order(None, groups, place, 90, 2, stamp)


def finish(compiling: Compiling) -> Compiling:
    for group in range(len(compiling._order.groups)):
        compiling.wait(group)
    compiling._thread.join(60)
    return compiling


def test_each_kernel_is_compiled_once_and_a_stamp_says_so(cache: Path) -> None:
    order = make_toy([[16, 32, 16], [64, 16]])
    first = start_unless_compiled(order, {})
    assert first is not None
    finish(first)
    assert [each["kernel"] for each in first.kernels] == ["fill"] * 3 and first.failures == []
    kernels = [path.parent for path in cache.rglob("fill.cubin")]
    assert len(kernels) == 3
    assert start_unless_compiled(order, {}) is None  # nothing is left to do
    (stamp,) = cache.glob("saccade-*.json")
    kernels[0].rename(cache / "elsewhere")
    assert not is_compiled(stamp)


def test_a_step_that_fails_costs_its_kernels_alone(cache: Path, tmp_path: Path) -> None:
    stamp = tmp_path / "stamp.json"
    found = finish(Compiling(make_toy([[16, -1, 32]], stamp=str(stamp))))
    assert len(found.kernels) == 2 and "ValueError: no such step" in found.failures[0]["why"]
    assert not stamp.exists()


def test_a_process_that_fails_is_told_to_the_log_alone(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "saccade"):
        found = finish(Compiling(make_toy([[16]], "toy_kernels:no_such")))
    assert found.kernels == [] and "exit code 1" in caplog.text and "no_such" in caplog.text


def test_ending_it_ends_all_processes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = Compiling(make_toy([[16]], NEVER))
    assert found._process is not None and len(list(tmp_path.glob("saccade-compiling-*"))) == 1
    found.end()
    found.end()
    assert found._process.returncode == -signal.SIGKILL and not list(tmp_path.glob("saccade-compiling-*"))


def test_without_a_folder_for_temporary_files_a_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    with caplog.at_level(logging.DEBUG, "saccade"):
        found = finish(Compiling(make_toy([[16]])))
    assert found._process is None and "No such file or directory" in caplog.text
    found.end()


def test_its_own_thread_may_end_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage is collected, and so an LLM is let go of, in whichever thread allocates."""
    monkeypatch.setattr(Compiling, "_note", lambda self, line: self.end())
    with caplog.at_level(logging.DEBUG, "saccade"):
        found = finish(Compiling(make_toy([[16]])))
    assert found._process is not None and found._process.returncode == -signal.SIGKILL
    assert "cannot join" not in caplog.text


DYING = """
import os, signal, sys, time
from saccade.api.compiling.beside import Compiling
from saccade.api.compiling.order import Order

compiling = Compiling(Order(None, [[16]], "toy_kernels:open_never", 90, 2, ""))
print(compiling._process.pid, flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_killed_parent(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder goes at the next start. One that somebody holds stays."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folders))
    held = OwnFolder()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)]), "TMPDIR": str(folders)}
    command = [sys.executable, "-c", DYING, str(tmp_path / "begun")]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert ran.returncode == -signal.SIGKILL and len(list(folders.iterdir())) == 2
    end = time.monotonic() + 30
    while read_state(int(ran.stdout)) not in ("", "Z"):
        assert time.monotonic() < end
        time.sleep(0.05)
    finish(Compiling(make_toy([[16]])))
    assert [str(folder) for folder in folders.iterdir()] == [held.path]
    held.remove()
    assert not list(folders.iterdir())


def test_a_folder_that_another_start_takes_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making one and holding it, it looks like one that was left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock_file, taken = disk.lock_file, list[int]()

    def lose(descriptor: int) -> bool:
        taken.append(descriptor)
        if len(taken) == 1:
            remove_left()
        if len(taken) == 3:
            raise BlockingIOError
        return lock_file(descriptor)

    monkeypatch.setattr(disk, "lock_file", lose)
    files = len(os.listdir("/proc/self/fd"))
    own = OwnFolder()
    assert len(taken) == 4 and Path(own.path).is_dir()
    own.remove()
    assert len(os.listdir("/proc/self/fd")) == files


KEYS = """
import json, sys
from dataclasses import replace
from saccade.api.compiling.folder import OwnFolder, remove_left
from saccade.api.compiling.meta_model import MetaModel, MetaStep, MetaShape, group_steps, run_step
from saccade.api.compiling.launches import note_launches
from saccade.api.loading.prepare import prepare

prepared = prepare(cache_tokens=8192, max_batch_tokens=512, max_requests=24, device="cpu", speculate=2)
found = note_launches(80)  # without dependent launches, which tensors on a CPU do not have

def run(device, settings, steps):
    shape = MetaShape(prepared.config, prepared.plan.stored, prepared.plan.layout, replace(settings, kernels="fast"))
    meta, before, keys = MetaModel(shape, device), len(found), []
    for step in steps:
        run_step(meta, step)
    return [(kernel.name, kernel.key) for kernel in found[before:]]

steps = [MetaStep(*step) for step in json.loads(sys.argv[1])]
both = [run("meta", prepared.settings, steps), run("cpu", prepared.settings, steps)]
for group in group_steps(prepared.settings):
    run("meta", prepared.settings, group)
print(json.dumps([len(both[0]), both[1], len(found), all(k.told[0] is not None for k in found), [k.name for k in found]]))
"""


def test_tensors_that_hold_nothing_need_the_kernels_of_those_that_do() -> None:
    """Keys hold which pointers are aligned, and which integers are 1 or multiples of 16: a step on tensors with memory
    needs no kernel that the same step without did not name. And no step of an LLM with drafts fails."""
    steps = [
        (1, 3, 128, 2),
        (1, 1, 65),
        (2, 1, 65),
        (1, 33, 33),
        (7, 1, 700),
        (24, 1, 1000),
        (1, 300, 300),
        (1, 90, 90, 2),
    ]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KEYS, json.dumps(steps)]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    meta, more, together, are_keys, names = json.loads(ran.stdout.splitlines()[-1])
    assert meta > 60 and more == [] and together > meta and are_keys
    assert "_draw" in names


def test_the_first_layers_that_differ_are_enough() -> None:
    config = find_shape("v32-rank-of-8", 12).config
    plan = plan_weights(config)
    assert count_unlike_layers(MetaShape(config, plan.stored, plan.layout, None)) == 4  # type: ignore[arg-type]


def test_what_a_first_answer_needs_comes_first() -> None:
    settings = replace(prepare(cache_tokens=8192, device="cpu").settings, max_batch_tokens=4096)
    first, prompts, decodes, wide = group_steps(settings)
    assert first == [MetaStep(1, 1, 128), MetaStep(1, 128, 128)]
    assert {step.tokens for step in prompts} >= {1, 2, 8, 16, 48, 256, 3584} and {s.requests for s in prompts} == {1}
    assert [step.requests for step in decodes] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 48, 64]
    assert max(step.context for step in wide) == 4096
    few = group_steps(replace(settings, speculate=2, max_requests=2, max_batch_tokens=100))
    assert few[0] == [MetaStep(1, 3, 100, 2), MetaStep(1, 1, 100), MetaStep(1, 100, 100, 2)]
    assert [step[:2] for step in few[2]] == [(1, 3), (1, 1), (2, 3), (2, 1)]


def test_processes_are_as_many_as_cpus_and_memory_are_there_for() -> None:
    assert count_processes({}, cpus=16, free=1 << 40) == 12
    assert count_processes({}, cpus=4, free=1 << 40) == 3
    assert count_processes({}, cpus=16, free=5 << 30) == 5
    assert count_processes({}, cpus=1, free=1 << 40) == 0
    assert count_processes({"SACCADE_COMPILERS": "0"}, cpus=16, free=1 << 40) == 0
    assert count_processes({"SACCADE_COMPILERS": "2"}, cpus=16, free=1 << 40) == 2


@pytest.mark.parametrize("asked", ["-1", "off", "1.5", "1025", "9" * 5000])
def test_a_number_of_processes_that_makes_no_sense_is_told_and_ignored(
    asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert count_processes({"SACCADE_COMPILERS": asked}, cpus=4, free=1 << 40) == 3
    (told,) = caplog.messages
    assert told.startswith(f"SACCADE_COMPILERS: expected a number of processes, 0 to 1024, found '{asked[:9]}")
    assert told.endswith("it is ignored") and len(told) < 200


def test_another_order_has_another_stamp() -> None:
    prepared = prepare(cache_tokens=8192, device="cpu")
    shape = MetaShape(prepared.config, prepared.plan.stored, prepared.plan.layout, prepared.settings)
    order = Order(shape, group_steps(prepared.settings), FILL, 90, 8, "")
    own = hash_order(order, ("2.11", "3.6"), {})
    assert own == hash_order(order._replace(processes=3, stamp="x"), ("2.11", "3.6"), {"HOME": "/"})
    other = shape._replace(settings=replace(prepared.settings, index_cache="fp8"))
    later = replace(prepared.settings, path="/elsewhere", cache_tokens=8256, cache_bytes=7)  # less memory is free
    assert forget_sizes(later) == forget_sizes(prepared.settings) != forget_sizes(other.settings)
    changed = [order._replace(capability=100), order._replace(shape=other)]
    assert len({own, *(hash_order(each, ("2.11", "3.6"), {}) for each in changed)}) == 3
    assert own != hash_order(order, ("2.11", "3.7"), {}) != hash_order(order, ("2.11", "3.7"), {"TRITON_DEBUG": "1"})


@pytest.mark.parametrize(
    ("kernels", "local_rank", "environment", "starts"),
    [
        ("fast", 0, {"SACCADE_COMPILERS": "2"}, True),
        ("fast", 0, {"SACCADE_COMPILERS": "0"}, False),
        ("fast", 1, {"SACCADE_COMPILERS": "2"}, False),
        ("reference", 0, {"SACCADE_COMPILERS": "2"}, False),
    ],
)
def test_one_rank_of_a_machine_compiles_if_it_runs_kernels(
    kernels: str, local_rank: int, environment: dict[str, str], starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(beside, "order_all", lambda prepared, count: asked.append(count))
    monkeypatch.setattr(beside, "start_unless_compiled", lambda order, environment: "started")
    prepared = SimpleNamespace(settings=SimpleNamespace(kernels=kernels), place=SimpleNamespace(local_rank=local_rank))
    assert compile_beside(prepared, environment) == ("started" if starts else None)
    assert asked == [2] * starts


def test_a_start_goes_on_without_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepared = SimpleNamespace(settings=SimpleNamespace(kernels="fast"), place=SimpleNamespace(local_rank=0))
    with caplog.at_level(logging.DEBUG, "saccade"):
        assert compile_beside(prepared, {"SACCADE_COMPILERS": "2"}) is None  # there is no plan
    assert "kernels are not compiled beside the start" in caplog.text


def test_compilers_are_for_a_gpu() -> None:
    with pytest.raises(RequestError, match="compilers: kernels are compiled beforehand for a GPU"):
        bench_start("bundled", 1, context=8, device="cpu", compilers=2)
    with pytest.raises(RequestError, match="compilers: expected a number of processes, 0 or more, found -1"):
        bench_start("bundled", 1, context=8, device="cpu", compilers=-1)
