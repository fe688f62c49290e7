"""The kernels of a start, compiled into Triton's cache by processes of their own while weights are made or read.

Which kernels those are is told by the code that launches them: the model runs once on CPU tensors of the right shapes
that hold nothing, each launch is compiled and none is made. That needs no device. Of N processes each compiles every
Nth kernel. Knows no numbers. Next: steps/start.py, which waits for it before its first step.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from os import environ
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from saccade.bench.shapes import find_shape
from saccade.bench.steps.eager import prefill
from saccade.bench.synthetic import plan_weights
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.engine.pages import allocate_cache
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.kernels.embed import advance
from saccade.models.dsa.transformer import Transformer
from saccade.ops.gpu import Gpu
from saccade.ops.step import Batch
from saccade.weights.loader import Weights

HOPPER = GPUTarget("cuda", 90, 32)
# What a compiling process runs. TRITON_INTERPRET would interpret the kernels.
COMPILE_PROGRAM = "from saccade.bench.compiled import compile_share; compile_share({wish!r}, {share}, {count})"


def compile_instead(
    take: Callable[[str, dict[str, Any], Callable[[], Any]], None], share: int = 0, count: int = 1
) -> None:
    """From now on launches in this process only compile, for a Hopper GPU, every `count`-th kernel from `share` on.
    `take` gets the name of each launch, its options, and what compiles it: None comes out for kernels of others."""
    device = SimpleNamespace(
        get_current_target=lambda: HOPPER, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    triton.runtime.driver.set_active(device)
    run, build = JITFunction.run, getattr(JITFunction, "_do_compile", None)  # where it lacks, each compiles all
    numbers: dict[tuple[int, Any], int] = {}  # of kernels, in the order of their first launches

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        take(self.fn.__name__, options, lambda: run(self, *args, grid=grid, warmup=True, **options))

    def build_own(self: Any, key: Any, *rest: Any) -> Any:
        number = numbers.setdefault((id(self), key), len(numbers))
        return build(self, key, *rest) if build is not None and number % count == share else None

    JITFunction.run = compile_only
    if build is not None:
        JITFunction._do_compile = build_own
    from saccade.kernels import launch

    launch.uses_pdl = lambda tensor: True


def make_hollow_model(shape: str) -> tuple[Transformer, Any]:
    """A dense and a sparse layer of a shape between its embedding and its head, with parameters that nobody wrote; and
    the plan of their weights."""
    config = find_shape(shape, 4).config
    plan = plan_weights(config, mtp=False)
    tensors = {s.name: torch.empty(s.shape, dtype=TORCH_DTYPES[s.dtype]) for s in plan.stored.values()}
    model = Transformer(config, Weights(tensors, kept=plan.stored), Gpu())
    model.layers = model.layers[2:4]
    for i, layer in enumerate(model.layers):
        layer.attention.layer = i
    return model, plan


def run_start(shape: str, context: int, batch: int, chunk: int) -> None:
    """The steps of steps/start.py: a prompt of `context` tokens, then a decode step of `batch` requests."""
    model, plan = make_hollow_model(shape)
    pages = -(-(context + PAGE) // PAGE)
    cache = allocate_cache(model.config, batch * pages + 1, plan.dtype, "cpu", mtp=False)
    table = torch.arange(1, batch * pages + 1).view(batch, pages)
    model.logits(prefill(model, cache, torch.zeros(context, dtype=torch.int64), table[:1], chunk))
    rows = torch.arange(batch)

    def zeros() -> Tensor:
        return torch.zeros_like(rows)

    at = torch.full_like(rows, context)
    start = torch.arange(batch + 1)
    decode = Batch(zeros(), at, table[:, -1] * PAGE, rows, table, at + 1, start, rows)
    logits = model.find_logits(decode, cache)
    advance(logits, zeros(), zeros(), zeros(), zeros(), zeros(), table)


@torch.inference_mode()
def compile_share(wish: str, share: int, count: int) -> None:
    """In a process of its own: every `count`-th kernel of a start. `wish`: the arguments of `run_start`, as JSON.
    Prints how many it compiled."""
    compiled: set[int] = set()

    def take(name: str, options: dict[str, Any], launch: Callable[[], Any]) -> None:
        kernel = launch()
        if kernel is not None:
            compiled.add(id(kernel))

    compile_instead(take, share, count)
    run_start(**json.loads(wish))
    print(len(compiled))


class Compiling:
    """Processes that compile the kernels of a start."""

    def __init__(self, wish: dict[str, Any], count: int) -> None:
        env = {name: value for name, value in environ.items() if name != "TRITON_INTERPRET"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", COMPILE_PROGRAM.format(wish=json.dumps(wish), share=share, count=count)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
            )
            for share in range(count)
        ]  # fmt: skip

    def wait(self) -> list[int]:
        """Until all have ended; how many kernels each compiled. RequestError with the last line of one that failed."""
        counts = list[int]()
        for process in self._processes:
            out, told = process.communicate()
            if process.returncode:
                for other in self._processes:
                    other.kill()
                last = (told.splitlines() or ["no message"])[-1]
                raise RequestError(f"a process that compiles kernels failed: {last}")
            counts.append(int(out.split()[-1]))
        return counts
