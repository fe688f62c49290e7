"""Variants of a whole step: `python -m tools.kernel_bench.step linear.split_k.SPLIT_K.stages=4`.

Options: `--batch 8`, or `--prefill`.

A variant is one or more constants of saccade/kernels, separated by commas, with other values. Each is captured,
compared with the step as it is, and timed: a wrong one is told apart before its time can please anybody. What single
kernels take is in the profile, and repeats within 0.3 us; a whole step captured twice differs by up to 1 us a layer. A
constant is changed in the module that defines it: a name that another one imported keeps its value. Next:
saccade/bench/steps/decode.py, which makes records.
"""

import argparse
import statistics
import sys
from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.api.step_sizes import BATCH_TOKENS
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


@contextmanager
def changed(variant: str) -> Iterator[None]:
    """With the constants that `variant` names: linear.split_k.SPLIT_K.stages=3, of a named tuple, or
    linear.split_k.LONG_BYTES=7. Raises ValueError for what is not there."""
    kept: list[tuple[Any, str, Any]] = []
    try:
        for part in filter(None, variant.split(",")):
            place, _, value = part.partition("=")
            names = place.split(".")
            folders = list(takewhile(str.islower, names))
            name, path = ".".join(folders), names[len(folders) :]
            if not value or not folders or not 1 <= len(path) <= 2:
                raise ValueError(f"{part!r}: expected folder.module.NAME=value or folder.module.NAME.field=value")
            try:
                module = import_module(f"saccade.kernels.{name}")
                new = literal_eval(value)
            except ModuleNotFoundError:
                raise ValueError(f"{part!r}: kernels has no module {name}") from None
            except (SyntaxError, ValueError):
                raise ValueError(f"{part!r}: expected a Python literal, found {value!r}") from None
            old, fields = getattr(module, path[0], None), path[1:]
            if old is None or not set(fields) <= set(getattr(old, "_fields", ())):
                raise ValueError(f"{part!r}: kernels.{name} has no {'.'.join(path)}")
            kept.append((module, path[0], old))
            setattr(module, path[0], old._replace(**{fields[0]: new}) if fields else new)
        yield
    finally:
        for module, name, old in reversed(kept):
            setattr(module, name, old)


class Run(NamedTuple):
    """What a variant gave."""

    logits: Tensor
    ms: float  # of a step, or of all of a prompt
    kernels: list[tuple[str, float]]  # and us: of a layer, or of all of a prompt


class Bench(Protocol):
    def run(self, variant: str) -> Run: ...


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
    def run(self, variant: str) -> Run:
        model = self.rig.make_model("packed")
        with changed(variant):
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
    def run(self, variant: str) -> Run:
        model, device = self.rig.make_model("packed"), self.rig.device
        with changed(variant):
            logits = self.prompt.find_logits(model)
            samples = time_samples(lambda: self.prompt.run(model), device, SAMPLES)
            total: dict[str, float] = {}
            for name, us in time_kernels(lambda: self.prompt.run(model), device, 2):
                total[name] = total.get(name, 0.0) + us
        return Run(logits, statistics.median(samples), sorted(total.items(), key=lambda item: -item[1]))


def show(variant: str, bench: Bench, right: Tensor | None) -> Tensor | None:
    """Print a line about a variant, and return its logits: None if it fails, as one that does not compile must not end
    the comparison."""
    try:
        logits, ms, kernels = bench.run(variant)
    except Exception as error:
        print(f"{variant:40} FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None
    off = 0.0 if right is None else float((logits - right).abs().max() / right.abs().max())
    judged = "" if off < NEAR else "WRONG "
    layer = " ".join(f"{name.lstrip('_')[:16]} {us:.1f}" for name, us in kernels)
    print(
        f"{variant or 'as it is':40} {judged}{ms:7.3f} ms, logits {off:.0e} off, "
        f"{sum(us for _, us in kernels):6.1f} us: {layer}",
        flush=True,
    )
    return logits


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time variants of a whole step on a GPU.")
    parser.add_argument("variants", nargs="*", help="folder.module.NAME.field=value[,...] of kernels/")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--prefill", action="store_true", help="a prompt, not steps")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--shape", default="v32-rank-of-8")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--activations", default="exact", help="exact, bf16 or fp8: of steps of more than 64 tokens")
    asked = parser.parse_args(arguments)
    try:
        for variant in asked.variants:
            with changed(variant):  # what is misspelled ends this before anything is built
                pass
    except ValueError as error:
        parser.error(str(error))
    if asked.prefill and asked.batch:
        parser.error("--batch is of steps, --prefill of one prompt: expected one of them")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    rig = build_rig(asked.shape, asked.layers, torch.device("cuda"))
    rig.activations = asked.activations
    for batch in [0] if asked.prefill else asked.batch or (1, 8):
        what = f"batch {batch}, context" if batch else "a prompt of"
        print(f"{torch.cuda.get_device_name()}, {what} {asked.context}, {asked.layers} layers", flush=True)
        bench = Decode(rig, batch, asked.context) if batch else Prefill(rig, asked.context)
        right = show("", bench, None)
        if right is None:
            sys.exit("the step as it is failed: nothing to compare variants with")
        for variant in asked.variants:
            show(variant, bench, right)
        show("", bench, right)  # once more: how far two runs of the same are apart


if __name__ == "__main__":
    main()
