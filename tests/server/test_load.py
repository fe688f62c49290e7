"""64 clients that stream for a minute: every answer is the one given alone, and memory and pages stay what they were.

`make soak` runs it; docs/soak.txt has its log.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from served_model import ServedModel, read_events, serving

from saccade.eval.tasks import draw_test

CLIENTS, SECONDS = 64, float(os.environ.get("SACCADE_LOAD_SECONDS", "60"))
Answer = tuple[str, int, str]  # text, tokens, finish reason


def make_bodies() -> list[dict[str, Any]]:
    """Word problems, greedy and at random, short and long."""
    bodies = []
    for i in range(24):
        prompt = draw_test("words", i).prompt
        bodies.append(
            {"prompt": prompt, "max_tokens": 24 + 4 * i, "temperature": i % 3 / 2, "seed": i, "ignore_eos": i % 2 == 1}
        )
    return [body | {"stream": True, "stream_options": {"include_usage": True}} for body in bodies]


def read_answer(text: str) -> Answer:
    *events, done = read_events(text)
    assert done == "[DONE]", text[-500:]
    chunks = [json.loads(event) for event in events]
    assert all("choices" in chunk for chunk in chunks), text[-500:]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join(c["text"] for c in choices), chunks[-1]["usage"]["completion_tokens"], choices[-1]["finish_reason"]


def read_memory(pid: int) -> float:
    """MiB of a process that are its own."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


async def run_clients(served: ServedModel, known: list[Answer], leavers: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again and again; the first `leavers` go away in the middle of most answers."""
    bodies, end = make_bodies(), time.monotonic() + seconds
    tally: dict[str, Any] = {"answers": 0, "tokens": 0, "left": 0, "wrong": [], "memory": []}
    pids = (served.process.pid, served.find_engine())

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        dice = Random(f"{number}/{leavers}")
        while time.monotonic() < end:
            place = dice.randrange(len(bodies))
            async with client.stream("POST", "/v1/completions", json=bodies[place]) as told:
                assert told.status_code == 200, await told.aread()
                lines, patience = list[str](), dice.randrange(2, 30) if number < leavers else 10**9
                async for line in told.aiter_lines():
                    lines.append(line)
                    if len(lines) > patience:
                        break
            if len(lines) > patience:
                tally["left"] += 1
                continue
            answer = read_answer("\n".join(lines))
            tally["answers"] += 1
            tally["tokens"] += answer[1]
            if answer != known[place]:
                tally["wrong"].append((place, answer, known[place]))

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(min(5.0, seconds / 10))
            tally["memory"].append(tuple(round(read_memory(pid), 1) for pid in pids))

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits, trust_env=False) as client:
        await asyncio.gather(watch(), *(ask(client, number) for number in range(CLIENTS)))
    return tally


def show(name: str, tally: dict[str, Any], seconds: float) -> None:
    rate, memory = tally["tokens"] / seconds, tally["memory"]
    print(
        f"{name}: {CLIENTS} clients, {seconds:g} s, {tally['answers']} answers, {tally['tokens']} tokens ({rate:.0f}/s),"
    )
    print(f"  {tally['left']} clients left early, {len(tally['wrong'])} answers differ from those given alone")
    print(
        f"  MiB of the server's and the engine's process: {memory[0]} ... {memory[len(memory) // 2]} ... {memory[-1]}"
    )


@pytest.mark.soak
@pytest.mark.timeout(1800)  # on a machine that has other work
def test_load_and_clients_that_leave() -> None:
    with serving("--cache-tokens", "32768", "--speculate", "2") as served:
        known = [read_answer(served.post("/v1/completions", body).text) for body in make_bodies()]
        for name, leavers, seconds in (("load", 0, SECONDS), ("a third leaves", CLIENTS // 3, SECONDS / 2)):
            tally = asyncio.run(run_clients(served, known, leavers, seconds))
            show(name, tally, seconds)
            assert tally["wrong"] == [] and tally["answers"] > 0, tally["wrong"][:3]
            assert bool(tally["left"]) == bool(leavers)
            for early, late in zip(tally["memory"][len(tally["memory"]) // 3], tally["memory"][-1], strict=True):
                assert late < 1.1 * early + 16, tally["memory"]
            served.wait_for("saccade_requests_running", 0)
            assert served.measure("saccade_requests_waiting") == 0 and served.measure("saccade_cache_pages_used") == 0
        assert served.process.poll() is None
