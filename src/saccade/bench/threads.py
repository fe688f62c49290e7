"""How long work on a CPU takes alone, and beside busy processes, by the number of threads that compute.

Each sample is a process of its own, so that threads and how they wait are set before torch is loaded. Alone and beside
alternate. Busy processes are started here and ended here, by their ids; they also end by themselves when this process
has, or when their time is up. Next: api/settings/threads.py, which chooses the number.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from saccade.api.settings.threads import COUNTS, WAITS, sleeping_threads
from saccade.base.json_text import to_json
from saccade.base.limits import count_cpus
from saccade.base.values import is_count, is_number, show, show_count
from saccade.errors import RequestError

PROMPT = (  # README's
    "Lucy has 4 boxes with 9 pencils each. Then she buys 12 more pencils. She puts the pencils into 6 bags, the same "
    "number in each. How many pencils are in each of the bags?"
)
THREAD_TASKS = {
    "prompt": "the prompt of the README, greedy",
    "eval": "saccade eval --problems 6",
    "many": "200 word problems in one call, greedy",
}
BUSY_PROGRAM = """
import os, sys, time
parent, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def bench_threads(
    threads: Sequence[int | None] = (1, 2, None),
    busy: int = 2,
    repeats: int = 3,
    tasks: Sequence[str] = tuple(THREAD_TASKS),
    limit: float = 600.0,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Seconds of each of `tasks` with each number of `threads` (None: the engine's choice), alone and beside `busy`
    processes: medians of `repeats`. Loading counts in `eval` alone. A sample that takes longer than `limit` seconds is
    ended and counts as that. Raises RequestError for senseless numbers, or if a sample fails."""
    if not tasks or not set(tasks) <= THREAD_TASKS.keys():
        raise RequestError(f"task: expected {', '.join(THREAD_TASKS)}, found {', '.join(tasks) or 'none'}")
    for name, values in (("threads", [n for n in threads if n is not None]), ("busy", [busy]), ("repeats", [repeats])):
        if not all(is_count(value, 1) for value in values):
            raise RequestError(f"{name}: expected integers of at least 1, found {show(values)}")
    if not is_number(limit) or limit <= 0:
        raise RequestError(f"limit: expected seconds above 0, found {show(limit)}")
    found: dict[str, Any] = {
        "command": " ".join(["saccade", *sys.argv[1:]]),
        "cpus": count_cpus(),
        "busy": busy,
        "load": "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg()),
        "repeats": repeats,
        "limit_s": limit,
    }
    rows = []
    for task in tasks:
        for count in threads:
            tell(f"{THREAD_TASKS[task]}: {'threads as chosen' if count is None else show_count(count, 'thread')}")
            alone, beside = list[dict[str, Any]](), list[dict[str, Any]]()
            for _ in range(repeats):
                alone.append(measure_task(task, count, limit))
                with busy_processes(busy, limit + 60):
                    beside.append(measure_task(task, count, limit))
            rows.append(sum_up(task, count, alone, beside))
    return found | {"rows": rows}


def sum_up(task: str, count: int | None, alone: list[dict[str, Any]], beside: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians and their ratio, and every sample."""
    medians = [statistics.median(sample["seconds"] for sample in some) for some in (alone, beside)]
    return {
        "task": task,
        "threads": "auto" if count is None else str(count),
        "used": next((s["threads"] for s in alone + beside if s["threads"]), None),
        "alone_s": medians[0],
        "beside_s": medians[1],
        "times_alone": medians[1] / medians[0],
        "cut": sum(sample["threads"] is None for sample in alone + beside),
        "samples_s": [[round(sample["seconds"], 3) for sample in some] for some in (alone, beside)],
    }


def measure_task(task: str, count: int | None, limit: float) -> dict[str, Any]:
    """One sample, in a process of its own: its seconds, and the threads that it used (None: it was cut short)."""
    environment = {name: value for name, value in os.environ.items() if name not in (*COUNTS, *WAITS)}
    line = [sys.executable, "-m", "saccade.bench.threads", task, "auto" if count is None else str(count)]
    try:
        ran = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"seconds": limit, "threads": None}
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no word"])[-1]
        raise RequestError(f"{task}: a sample failed with exit code {ran.returncode}: {reason}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


@contextmanager
def busy_processes(count: int, seconds: float) -> Iterator[list[int]]:
    """So many processes that compute, for at most so many seconds; their ids. None of them is left afterwards."""
    line = [sys.executable, "-c", BUSY_PROGRAM, str(os.getpid()), str(seconds)]
    started = list[subprocess.Popen[bytes]]()
    try:
        for _ in range(count):
            started.append(subprocess.Popen(line))
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def run_task(task: str, count: int | None) -> dict[str, Any]:
    """A task in this process."""
    with sleeping_threads():
        import torch

        from saccade.api.llm import LLM
        from saccade.eval.evaluate import evaluate
        from saccade.eval.tasks import draw_test
    from saccade.engine.params import SamplingParams

    if task == "eval":
        start = time.perf_counter()
        evaluate(problems=6, device="cpu", threads=count)
        return {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
    llm = LLM(device="cpu", threads=count)
    prompts = [PROMPT] if task == "prompt" else [draw_test("words", i, 0).prompt for i in range(200)]
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=60))
    return {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}


def show_threads(found: dict[str, Any]) -> str:
    """The conditions, and a line for each task and number of threads."""
    lines = [f"{key:9} {value}" for key, value in found.items() if key != "rows"]
    lines.append(f"\n{'task':8}{'threads':>8}{'used':>6}{'alone s':>10}{'beside s':>10}{'ratio':>8}")
    for row in found["rows"]:
        cut = f"  {row['cut']} cut at the limit" if row["cut"] else ""
        numbers = f"{row['alone_s']:>10.2f}{row['beside_s']:>10.2f}{row['times_alone']:>8.2f}"
        lines.append(f"{row['task']:8}{row['threads']:>8}{row['used'] or '-':>6}{numbers}{cut}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(to_json(run_task(sys.argv[1], None if sys.argv[2] == "auto" else int(sys.argv[2]))))
