"""What it costs rank 0 to tell the other ranks of its machine a step, and when the last of them has heard it.

    python -m saccade.bench.ranks.control --ranks 8

The ranks are processes that wait as those of a model do (parallel/lead.py, follow.py), and compute nothing. Clocks of
one machine agree, so that each notes when a message came. Next: engine/ranks/replicate.py, what a message says.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from typing import Any

from saccade.base.json_text import to_json
from saccade.base.limits import count_cpus
from saccade.parallel.follow import Follow
from saccade.parallel.lead import Lead
from saccade.parallel.link import LinkClosed, RankLink
from saccade.parallel.processes import die_with_parent

WARM_STEPS = 50
STEP_HEAD = {"do": "step", "drafts": 0, "events": []}  # of a step in which nothing enters
LONG_PROMPT = list(range(8192))  # of a step in which a request enters


def bench_control(ranks: int = 8, steps: int = 2000, pause: float = 0.002) -> dict[str, Any]:
    """`pause`: seconds between two steps, in which all sleep as they do beside a GPU."""
    lead = Lead()
    lead.start_local(ranks, "saccade.bench.ranks.control")
    try:
        lead.ask({"do": "ready"})
        plain = measure_steps(lead, STEP_HEAD, steps, pause)
        entering = STEP_HEAD | {"events": [{"add": LONG_PROMPT, "params": {"max_tokens": 64}, "capture": False}]}
        request = measure_steps(lead, entering, max(1, steps // 10), pause)
    finally:
        lead.close()
    return {
        "command": f"python -m saccade.bench.ranks.control --ranks {ranks} --steps {steps}",
        "cpus": count_cpus(), "load": os.getloadavg()[0], "python": sys.version.split()[0], "ranks": ranks,
        "pause_ms": 1e3 * pause, "step": plain, "step_with_a_prompt_of_8192": request,
    }  # fmt: skip


def measure_steps(lead: Lead, head: dict[str, Any], steps: int, pause: float) -> dict[str, float]:
    """us, of many steps: what rank 0 spends, and until the last rank has the message."""
    sent, spent = list[int](), list[float]()
    for i in range(WARM_STEPS + steps):
        time.sleep(pause)
        start = time.monotonic_ns()
        lead.tell(head)
        end = time.monotonic_ns()
        if i >= WARM_STEPS:
            sent.append(start)
            spent.append((end - start) / 1e3)
    heard = [reply.head["heard"][-steps:] for reply in lead.ask({"do": "times"})]
    last = [(max(times) - start) / 1e3 for start, *times in zip(sent, *heard, strict=True)]
    return {
        "host_us": statistics.median(spent), "host_p95_us": quantile(spent, 0.95),
        "last_rank_us": statistics.median(last), "last_rank_p95_us": quantile(last, 0.95),
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def listen(fd: int, parent: int) -> None:
    """A rank."""
    die_with_parent(parent)
    follow, heard = Follow(RankLink(socket.socket(fileno=fd)), parent), list[int]()
    try:
        while (what := follow.receive().head["do"]) != "end":
            if what == "step":
                heard.append(time.monotonic_ns())
            else:
                follow.reply({"heard": heard})
    except LinkClosed:
        os._exit(1)
    follow.leave()
    os._exit(0)


def show_control(found: dict[str, Any]) -> str:
    lines = [f"{key:9} {value}" for key, value in found.items() if not isinstance(value, dict)]
    lines.append(f"\n{'us':28}{'rank 0':>10}{'p95':>10}{'last rank':>12}{'p95':>10}")
    for name, row in found.items():
        if isinstance(row, dict):
            numbers = [row[key] for key in ("host_us", "host_p95_us", "last_rank_us", "last_rank_p95_us")]
            lines.append(f"{name.replace('_', ' '):28}" + "{:>10.1f}{:>10.1f}{:>12.1f}{:>10.1f}".format(*numbers))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if len(arguments) == 2 and all(word.isdecimal() for word in arguments):
        listen(int(arguments[0]), int(arguments[1]))
    parser = argparse.ArgumentParser(prog="python -m saccade.bench.ranks.control", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args(arguments)
    found = bench_control(a.ranks, a.steps)
    print(to_json(found) if a.json else show_control(found))


if __name__ == "__main__":
    main(sys.argv[1:])
