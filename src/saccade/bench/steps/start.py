"""From the start of a process to its first token, stage by stage, with kernels compiled anew and with them cached.

Each run is an interpreter of its own, as a user's would be; only the weights are made instead of read. The first one
has an empty folder for Triton's kernels, the second one that of the first. Next: rig.py.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from os import environ
from typing import Any, NamedTuple

import torch

from saccade.api.compiling.beside import Compiling, start_unless_compiled
from saccade.api.compiling.meta_model import META, MetaModel, MetaShape
from saccade.api.compiling.order import Order, count_processes
from saccade.api.loading.machine import find_capability
from saccade.api.settings.resolve import Settings, choose_activations
from saccade.base.memory import naming_memory
from saccade.base.values import is_count, show
from saccade.bench.record import Record, describe_run, find_device, print_table, require_counts, show_run
from saccade.bench.rig import build_rig, choose_arrangement, require_arrangements
from saccade.bench.shapes import find_shape
from saccade.bench.steps.eager import prefill, random_tokens, shuffle_pages
from saccade.engine.pages import allocate_cache
from saccade.errors import RequestError, SaccadeError
from saccade.kernels import PAGE
from saccade.kernels.embed import advance
from saccade.ops.step import Batch
from saccade.plan.types import Plan

START_STAGES = (
    "interpreter", "imports", "device", "plan", "weights", "model", "compilers", "kernels", "capture", "first_token",
)  # fmt: skip
START_COLUMNS = (
    ("kernel_cache", "kernel cache", ""),
    *((f"{stage}_s", stage, ".2f") for stage in START_STAGES),
    ("total_s", "total s", ".2f"),
)
START_CHUNK = 2048
OPEN_START = "saccade.bench.steps.start:open_start"
# What a fresh interpreter runs; times are of the machine's clock, so that parent and child agree.
PROGRAM = "import time; t = time.time(); from saccade.bench.steps.start import report; report(t, {wish!r})"


def bench_start(
    shape: str = "v32-rank-of-8",
    layers: int | None = None,
    context: int = 128,
    batch: int = 1,
    arrangement: str | None = None,
    device: str = "auto",
    seed: int = 0,
    commit: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    compilers: int | None = None,
) -> list[Record]:
    """Two records, cold and warm. `context`: tokens of the prompt; `batch`: of the captured decode step. `compilers`:
    processes that compile kernels while weights are made; 0: they are compiled one after the other, where a step first
    launches them; None: as many as LLM has."""
    require_counts(context=context, batch=batch)
    if not (compilers is None or is_count(compilers, 0)):
        raise RequestError(f"compilers: expected a number of processes, 0 or more, found {show(compilers)}")
    at = find_device(device)
    name = arrangement or choose_arrangement(at)
    require_arrangements([name], at)
    config = find_shape(shape, layers).config
    if context >= config.max_position_embeddings:
        raise RequestError(f"context: expected at most {config.max_position_embeddings - 1}, found {context}")
    is_usual = at.type == "cuda" and name == choose_arrangement(at)
    if compilers and not is_usual:
        raise RequestError("compilers: kernels are compiled beforehand for a GPU, in its default arrangement")
    if compilers is None:
        compilers = count_processes(environ) if is_usual else 0
    wish = {"shape": shape, "layers": layers, "context": context, "batch": batch, "arrangement": name}
    wish |= {"device": str(at), "seed": seed, "compilers": compilers}
    run = {**describe_run(at, commit), **wish, "layers": config.num_hidden_layers, "share_of_bandwidth": None}
    run["device"] = describe_run(at, commit)["device"]
    records = []
    with tempfile.TemporaryDirectory(prefix="saccade-kernels-") as folder:
        for state in ("cold", "warm"):
            found = run_once(wish, folder)
            say(f"{state}: {found['total_s']:.1f} s")
            records.append({**run, "kernel_cache": state, "ttft_ms": found["total_s"] * 1e3, **found})
    return records


def run_once(wish: dict[str, Any], kernels: str) -> dict[str, float]:
    """One fresh process, which keeps its compiled kernels in the folder `kernels`; seconds of each stage."""
    begun = time.time()
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(wish=json.dumps(wish))],
        capture_output=True, text=True, env={**environ, "TRITON_CACHE_DIR": kernels},
    )  # fmt: skip
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise RequestError(f"the process that was timed failed: {last}")
    at: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
    times = [begun, *(at[stage] for stage in START_STAGES)]
    spans = {f"{stage}_s": b - a for stage, a, b in zip(START_STAGES, times[:-1], times[1:], strict=True)}
    return {**spans, "total_s": times[-1] - begun}


def report(started: float, wish: str) -> None:
    """In the fresh process: everything up to the first token; prints when each stage ended, or ends with why not."""
    imported = time.time()
    try:
        with naming_memory("weights, cache and steps", "try fewer --layers, a smaller --batch or --context"):
            found = start(**json.loads(wish))
    except SaccadeError as error:
        sys.exit(str(error))
    print(json.dumps({"interpreter": started, "imports": imported, **found}))


@torch.inference_mode()
def start(
    shape: str,
    layers: int | None,
    context: int,
    batch: int,
    arrangement: str,
    device: str,
    seed: int,
    compilers: int = 0,
) -> dict[str, float]:
    """When each stage after the imports ended."""
    at = find_device(device)
    ended = {}

    def mark(stage: str) -> None:
        if at.type == "cuda":
            torch.cuda.synchronize(at)
        ended[stage] = time.time()

    compiling = list[Compiling | None]()

    def begin(plan: Plan) -> None:
        if compilers:
            compiling.append(start_unless_compiled(order_start(plan, str(at), StartStep(context, batch), compilers)))

    torch.zeros(1, device=at)
    mark("device")
    rig = build_rig(shape, layers, at, seed, take_plan=begin)
    mark("model")
    before = ended["model"] - rig.seconds["model_s"]
    ended |= {"plan": before - rig.seconds["weights_s"], "weights": before}
    config = rig.shape.config
    pages = -(-(context + PAGE) // PAGE)
    cache = allocate_cache(config, batch * pages + 1, rig.plan.dtype, at, mtp=False)
    table, tokens = shuffle_pages(batch, pages, at), random_tokens(config.vocab_size, context, at)
    model = rig.make_model(arrangement)
    for each in filter(None, compiling):
        each.wait()
    mark("compilers")
    model.logits(prefill(model, cache, tokens, table[:1], START_CHUNK)).argmax().item()  # compiles
    mark("kernels")
    steps = rig.make_steps(arrangement, cache, batch, pages)
    steps.load(random_tokens(config.vocab_size, batch, at), torch.full((batch,), context, device=at), table)
    steps.run()
    mark("capture")
    model.logits(prefill(model, cache, tokens, table[:1], START_CHUNK)).argmax().item()
    mark("first_token")
    return ended


class StartStep(NamedTuple):
    """The steps that are timed: a prompt of `context` tokens, and a decode step of `batch` requests behind it."""

    context: int
    batch: int


def order_start(plan: Plan, device: str, step: StartStep, compilers: int) -> Order:
    """What processes compile beside the start."""
    config, pages = plan.config, step.batch * -(-(step.context + PAGE) // PAGE)
    settings = Settings(
        path="", device=device, dtype=plan.dtype, kernels="fast", mtp=False, index_cache="bf16", latent_cache="bf16",
        activations=choose_activations("auto", plan.dtype, "fast"),
        max_length=config.max_position_embeddings, cache_tokens=pages * PAGE, cache_bytes=0,
        max_batch_tokens=START_CHUNK, max_mixed_tokens=START_CHUNK, max_requests=step.batch,
    )  # fmt: skip
    shape = MetaShape(config, plan.stored, plan.layout, settings)
    return Order(shape, [[step]], OPEN_START, find_capability(device), compilers, "")


def open_start(shape: MetaShape) -> Callable[[StartStep], None]:
    """In a process that compiles: what `start` runs."""
    return partial(run_meta, MetaModel(shape))


@torch.inference_mode()
def run_meta(meta: MetaModel, step: StartStep) -> None:
    """The decode step first: its kernels take longest to compile."""
    model: Any = meta.model
    batch, pages = step.batch, -(-(step.context + PAGE) // PAGE)
    table = torch.zeros(batch, pages, dtype=torch.int64, device=META)
    rows = torch.arange(batch, device=META)
    at, start = torch.full_like(rows, step.context), torch.arange(batch + 1, device=META)
    chosen, tokens, slots = (torch.zeros_like(rows) for _ in range(3))
    lengths = at + 1
    logits = model.find_logits(Batch(tokens, at, slots, rows, table, lengths, start, rows), meta.cache)
    advance(logits, chosen, tokens, at, slots, lengths, table)
    prompt = torch.zeros(step.context, dtype=torch.int64, device=META)
    model.logits(prefill(model, meta.cache, prompt, table[:1], START_CHUNK))


def show_start(records: Sequence[Record]) -> str:
    """The table for people, with the conditions under it."""
    one = records[0]
    return show_run(
        print_table(records, START_COLUMNS),
        one,
        f"seconds; {one['layers']} layers, {one['arrangement']}, a prompt of {one['context']} tokens",
        f"kernels compiled by {one['compilers'] or 'no'} processes beside; compilers: the wait for those",
    )
