"""A whole step, or a prompt, timed and compared with the one before a change of the kernels.

    python -m tools.kernel_bench.step --batch 8 --save before.pt
    (change a constant of saccade/kernels, or take another commit)
    python -m tools.kernel_bench.step --batch 8 --against before.pt

Weights, tokens and caches are drawn from seeds, so logits are compared first: what is wrong is told apart before its
time can please anybody. What single kernels take is in the profile, and repeats within 0.3 us; a whole step captured
twice differs by up to 1 us a layer, so it is captured twice. Next: saccade/bench/steps/decode.py, which makes records.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.api.settings.step_sizes import BATCH_TOKENS
from saccade.bench.profile import fold_layer, time_kernels
from saccade.bench.record import time_samples
from saccade.bench.rig import Rig, build_rig
from saccade.bench.steps.eager import random_tokens, shuffle_pages
from saccade.bench.steps.fill import fill_caches
from saccade.bench.steps.prefill import PromptRun
from saccade.engine.graphs import DecodeGraph
from saccade.engine.pages import allocate_cache
from saccade.kernels import PAGE

STEPS, SAMPLES = 20, 5
NEAR = 1e-3  # of the largest logit: sums in another order are nearer


class Run(NamedTuple):
    """What a step, or a prompt, gave."""

    logits: Tensor
    ms: float  # of a step, or of all of a prompt
    kernels: list[tuple[str, float]]  # and us: of a layer, or of all of a prompt


class Bench(Protocol):
    def run(self) -> Run: ...


class Decode:
    """Steps on a cache of real rows, captured in a graph; kernels are those of a layer."""

    def __init__(self, rig: Rig, batch: int, context: int):
        self.rig, self.batch, self.pages = rig, batch, -(-context // PAGE)
        config, device = rig.shape.config, rig.device
        self.cache = allocate_cache(config, batch * self.pages + 1, rig.plan.dtype, device, mtp=False)
        self.table = shuffle_pages(batch, self.pages, device)
        fill_caches(self.cache, self.table, context, rig.make_rows(context))
        self.tokens = random_tokens(config.vocab_size, batch, device)
        self.first = torch.full((batch,), context - STEPS, device=device)

    @torch.inference_mode()
    def run(self) -> Run:
        model = self.rig.make_model("packed")
        graph = DecodeGraph(model, self.cache, self.batch, self.pages, self.rig.device)
        graph.load(self.tokens, self.first, self.table)
        graph.run()
        assert graph.logits is not None
        logits = graph.logits.clone()
        samples = []
        for _ in range(SAMPLES):
            graph.load(self.tokens, self.first, self.table)
            samples += time_samples(graph.run, self.rig.device, 1, STEPS)
        graph.load(self.tokens, self.first, self.table)
        kernels = fold_layer(time_kernels(graph.run, self.rig.device, 6))
        return Run(logits, statistics.median(samples), kernels)


class Prefill:
    """A prompt into an empty cache; kernels of one name are added up, the longest first."""

    def __init__(self, rig: Rig, context: int):
        config, device, pages = rig.shape.config, rig.device, -(-context // PAGE)
        cache = allocate_cache(config, pages + 1, rig.plan.dtype, device, mtp=False)
        tokens = random_tokens(config.vocab_size, context, device)
        self.rig, self.prompt = rig, PromptRun(cache, shuffle_pages(1, pages, device), tokens, BATCH_TOKENS["cuda"])

    @torch.inference_mode()
    def run(self) -> Run:
        model, device = self.rig.make_model("packed"), self.rig.device
        logits = self.prompt.find_logits(model)
        samples = time_samples(lambda: self.prompt.run(model), device, SAMPLES)
        total: dict[str, float] = {}
        for name, us in time_kernels(lambda: self.prompt.run(model), device, 2):
            total[name] = total.get(name, 0.0) + us
        return Run(logits, statistics.median(samples), sorted(total.items(), key=lambda item: -item[1]))


def describe_run(name: str, run: Run, right: Tensor | None) -> str:
    """A line. `right`: logits that it should have."""
    off = 0.0 if right is None else float((run.logits - right).abs().max() / right.abs().max())
    judged = "" if off < NEAR else "WRONG "
    layer = " ".join(f"{kernel.lstrip('_')[:16]} {us:.1f}" for kernel, us in run.kernels)
    total = sum(us for _, us in run.kernels)
    return f"{name:8} {judged}{run.ms:7.3f} ms, logits {off:.0e} off, {total:6.1f} us: {layer}"


def read_runs(path: Path, cases: Sequence[str]) -> dict[str, Run]:
    """What `--save` kept. ValueError if one of `cases` is not among them."""
    kept = {case: Run(*values) for case, values in torch.load(path, weights_only=True).items()}
    for case in cases:
        if case not in kept:
            raise ValueError(f"{path}: expected {case}, found {'; '.join(kept)}; save it with the same options")
    return kept


def save_runs(path: Path, runs: dict[str, Run]) -> None:
    torch.save({case: (run.logits.cpu(), run.ms, run.kernels) for case, run in runs.items()}, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time a whole step on a GPU, and compare it with another one's.")
    parser.add_argument("--save", type=Path, help="where to keep logits and times")
    parser.add_argument("--against", type=Path, help="what was saved before a change")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--prefill", action="store_true", help="a prompt, not steps")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--shape", default="v32-rank-of-8")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--activations", default="exact", help="exact, bf16 or fp8: of a prompt")
    asked = parser.parse_args(arguments)
    if asked.prefill and asked.batch:
        parser.error("--batch is of steps, --prefill of one prompt: expected one of them")
    told = f"{asked.context}, {asked.layers} layers of {asked.shape}, {asked.activations}"
    batches = [0] if asked.prefill else asked.batch or [1, 8]
    cases = [f"batch {batch}, context {told}" if batch else f"a prompt of {told}" for batch in batches]
    try:
        before = read_runs(asked.against, cases) if asked.against else {}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    rig, runs = build_rig(asked.shape, asked.layers, torch.device("cuda")), dict[str, Run]()
    rig.activations = asked.activations
    for batch, case in zip(batches, cases, strict=True):
        print(f"{torch.cuda.get_device_name()}, {case}", flush=True)
        bench: Bench = Decode(rig, batch, asked.context) if batch else Prefill(rig, asked.context)
        right = None
        if case in before:
            right = before[case].logits.to(rig.device)
            print(describe_run("before", before[case], None), flush=True)
        for name in ("now", "again"):  # how far two runs of the same are apart
            runs[case] = bench.run()
            print(describe_run(name, runs[case], right), flush=True)
            right = runs[case].logits if right is None else right
    if asked.save:
        save_runs(asked.save, runs)


if __name__ == "__main__":
    main()
