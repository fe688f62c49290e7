"""Time to the first token of a prompt whose beginning the cache holds, against one whose beginning is new.

Prompts are random tokens, so that each sample's beginning was never seen before; its second request ends with others.
A first pair, which may compile kernels, is not counted. Next: engine/scheduling/prefix_cache.py.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from saccade.api.llm import LLM
from saccade.base.values import is_count, show
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError


def bench_prefix(
    model: str | None = None,
    shared: int = 2000,
    new: int = 20,
    repeats: int = 5,
    device: str = "auto",
    speculate: int | str = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Seconds to the first token of `shared` + `new` tokens, the first time and the second. Raises RequestError for
    senseless numbers, and what LLM raises."""
    for name, value in (("shared", shared), ("new", new), ("repeats", repeats)):
        if not is_count(value, 1):
            raise RequestError(f"{name}: expected an integer of at least 1, found {show(value)}")
    llm = LLM(model, device, speculate=speculate, prefix_cache=True)
    dice, samples, found = random.Random(0), list[tuple[float, float]](), 0
    for sample in range(repeats + 1):
        beginning = [dice.randrange(llm.config.vocab_size) for _ in range(shared)]
        ends = [[dice.randrange(llm.config.vocab_size) for _ in range(new)] for _ in range(2)]
        (first, _), (second, found) = (measure_first(llm, [*beginning, *end]) for end in ends)
        if sample:
            samples.append((first, second))
            say(f"the first time {1e3 * first:.1f} ms, the second {1e3 * second:.1f} ms")
    first, second = (statistics.median(each) for each in zip(*samples, strict=True))
    return {
        "first_ms": round(1e3 * first, 2),
        "second_ms": round(1e3 * second, 2),
        "times_shorter": round(first / second, 1),
        "samples_ms": [f"{1e3 * a:.2f} {1e3 * b:.2f}" for a, b in samples],
        "prompt_tokens": shared + new,
        "cached_tokens": found,
        "model": llm.settings.path,
        "device": torch.cuda.get_device_name() if llm.settings.device.startswith("cuda") else "cpu",
        "kernels": llm.settings.kernels,
        "threads": llm.settings.threads,
        "speculate": speculate,
        "max_batch_tokens": llm.settings.max_batch_tokens,
        "load": "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg()),
        "torch": torch.__version__,
        "command": " ".join(["saccade", *sys.argv[1:]]),
    }


def measure_first(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Seconds to a prompt's first token, and how many of its tokens were in the cache."""
    start = time.perf_counter()
    (answer,) = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))
    return time.perf_counter() - start, answer.cached_tokens
