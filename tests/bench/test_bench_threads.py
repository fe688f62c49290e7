"""`saccade bench threads`: samples are sorted and summed up, and no busy process is left."""

import os
import subprocess
import sys
import time

import pytest

from saccade.bench import threads as bench
from saccade.errors import RequestError


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_busy_processes_are_there_meanwhile_and_none_afterwards():
    with pytest.raises(KeyboardInterrupt), bench.busy_processes(2, 30) as pids:
        assert len(set(pids)) == 2 and all(map(is_there, pids))
        raise KeyboardInterrupt
    assert not any(map(is_there, pids))


@pytest.mark.parametrize("arguments", [[str(os.getpid()), "0.2"], ["1", "60"]], ids=["time is up", "parent is gone"])
def test_a_busy_process_ends_by_itself(arguments):
    assert subprocess.run([sys.executable, "-c", bench.BUSY_PROGRAM, *arguments], timeout=20).returncode == 0


def test_alone_and_beside_alternate_and_medians_are_told(monkeypatch):
    asked, busy = [], []

    class Beside:
        def __init__(self, count, seconds):
            self.count = count

        def __enter__(self):
            busy.append(self.count)

        def __exit__(self, *_):
            busy.pop()

    def measure(task, count, limit):
        asked.append((task, count, len(busy)))
        return {"seconds": [1.0, 9.0, 2.0][len(asked) // 2 % 3] * (3 if busy else 1), "threads": count or 1}

    monkeypatch.setattr(bench, "busy_processes", Beside)
    monkeypatch.setattr(bench, "measure_task", measure)
    found = bench.bench_threads([2, None], busy=4, repeats=3, tasks=["prompt"], limit=5)
    assert asked[:6] == [("prompt", 2, 0), ("prompt", 2, 1)] * 3
    assert [(r["threads"], r["used"], r["alone_s"], r["cut"]) for r in found["rows"]] == [
        ("2", 2, 2, 0),
        ("auto", 1, 2, 0),
    ]
    assert [line.split()[:3] for line in bench.show_threads(found).splitlines()[-2:]] == [
        ["prompt", "2", "2"],
        ["prompt", "auto", "1"],
    ]


def test_a_sample_beyond_the_limit_is_ended_and_counted(monkeypatch):
    start = time.monotonic()
    assert bench.measure_task("eval", 1, 0.05) == {"seconds": 0.05, "threads": None}
    assert time.monotonic() - start < 20
    row = bench.sum_up("eval", 1, [{"seconds": 1.0, "threads": 1}], [{"seconds": 5.0, "threads": None}])
    assert (row["times_alone"], row["cut"]) == (5, 1)
    assert "1 cut at the limit" in bench.show_threads({"rows": [row]})


def test_a_sample_is_one_process_with_a_choice_of_its_own(monkeypatch):
    def run(line, env, **_):
        assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & env.keys()
        assert line[1:] == ["-m", "saccade.bench.threads", "prompt", "auto"]
        return subprocess.CompletedProcess(line, code, "note\n" + '{"seconds": 1.5, "threads": 1}', "a\nlast line\n")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "run", run)
    code = 0
    assert bench.measure_task("prompt", None, 5) == {"seconds": 1.5, "threads": 1}
    code = 3
    with pytest.raises(RequestError, match="^prompt: a sample failed with exit code 3: last line$"):
        bench.measure_task("prompt", None, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": [0]}, {"busy": 0}, {"repeats": 0}, {"tasks": ["nap"]}, {"tasks": []}, {"threads": [1.5]},
        {"limit": -1.0}, {"limit": float("nan")},
    ],
)  # fmt: skip
def test_senseless_numbers_are_refused(options):
    with pytest.raises(RequestError, match="expected"):
        bench.bench_threads(**options)
