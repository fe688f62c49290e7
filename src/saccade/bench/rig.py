"""The engine's own decode path on synthetic weights: one model, any number of arrangements of it on the same weights.

It drives the model on ops/gpu.py and `DecodeGraph`; the arrangement "reference" is the model on ops/reference.py. Knows
nothing of timing. Next: steps/decode.py, steps/prefill.py.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.bench.projection.arranged import find_ops
from saccade.bench.shapes import FLASH_SHAPES, ModelShape, find_shape
from saccade.bench.steps.eager import EagerSteps, Steps
from saccade.bench.steps.fill import RequestRows, prefill_rows
from saccade.bench.steps.routing import ROUTER, count_spread_experts, spread_experts
from saccade.bench.synthetic import make_weights, plan_weights
from saccade.engine.graphs import DecodeGraph
from saccade.errors import RequestError
from saccade.kernels.types import Chosen, Routing
from saccade.models.dsa.transformer import Transformer
from saccade.models.registry import fetch_place, find_family
from saccade.ops.step import Cache
from saccade.parallel.ranks import ONE_RANK, Ranks
from saccade.plan.types import Plan

REFERENCE_ARRANGEMENT = "reference"  # the arrangement that is the plain model
BENCH_ARRANGEMENTS = ("packed", "packed-fp8", "fused", "two-streams", "separate", "separate-fp8", REFERENCE_ARRANGEMENT)


@dataclass
class Rig:
    """The model, and how long it took to build."""

    shape: ModelShape
    plan: Plan
    model: Transformer
    device: torch.device
    seconds: dict[str, float]
    ranks: Ranks = ONE_RANK
    experts: str = ROUTER  # how tokens choose theirs: see steps/routing.py
    activations: str = "exact"  # what products of many tokens see of their inputs
    _made: dict[str, Transformer] = field(default_factory=dict)
    _rows: list[RequestRows] | None = None

    def make_model(self, arrangement: str) -> Transformer:
        """The model as `arrangement` runs it; made once."""
        is_reference = arrangement == REFERENCE_ARRANGEMENT
        if is_reference and self.experts == ROUTER and self.activations == "exact":
            return self.model
        if arrangement not in self._made:
            with torch.inference_mode():
                plain: Any = type(self.model.ops)
                ops: Any
                if is_reference:
                    ops = plain(self.ranks)
                elif arrangement == BENCH_ARRANGEMENTS[0]:
                    ops = fetch_kernels(self.shape)(ranks=self.ranks)
                else:
                    ops = find_ops(arrangement, self.model)
                ops.activations = self.activations
                if self.experts != ROUTER:
                    spread_experts(ops, self.shape.config)
                self._made[arrangement] = self.model.with_ops(ops)
        return self._made[arrangement]

    def make_steps(self, arrangement: str, cache: Cache, batch: int, pages: int) -> Steps:
        """A whole decode step, captured in a graph where the arrangement has one."""
        model = self.make_model(arrangement)
        if arrangement == REFERENCE_ARRANGEMENT or self.device.type != "cuda":
            return EagerSteps(model, cache, batch)
        with torch.inference_mode():
            steps: Steps = DecodeGraph(model, cache, batch_size=batch, pages=pages, device=self.device)
        return steps

    def make_rows(self, context: int) -> list[RequestRows]:
        """Rows of a real prefill, kept for shorter and longer contexts."""
        if self._rows is None or len(self._rows[0].latent) < context:
            model = self.make_model(choose_arrangement(self.device))
            self._rows = prefill_rows(model, self.shape.config, context, self.plan.dtype, self.device)
        return self._rows

    def count_experts(self, cache: Cache, tokens: Tensor, positions: Tensor, page_table: Tensor) -> float | None:
        """Distinct experts that a sparse layer reads in one step, on average; None without sparse layers."""
        c = self.shape.config
        if "sparse" not in c.mlp_layer_types:
            return None
        if self.experts != ROUTER:
            return count_spread_experts(c, len(tokens))
        ops = watch_experts(fetch_kernels(self.shape) if self.device.type == "cuda" else type(self.model.ops))
        ops.ranks = self.ranks
        steps = EagerSteps(self.model.with_ops(ops), cache, len(tokens))
        steps.load(tokens, positions, page_table)
        steps.run()
        chosen = torch.stack(ops.seen)  # [layers, B, topk]
        used = torch.zeros(len(chosen), c.n_routed_experts, device=chosen.device)
        return float(used.scatter_(1, chosen.flatten(1), 1.0).sum(1).mean())


def build_rig(
    name: str, layers: int | None, device: torch.device, seed: int = 0, mtp: bool = False, ranks: Ranks = ONE_RANK,
    with_flash: bool = False,
) -> Rig:  # fmt: skip
    """Plan, weights, model. RequestError if the device has too little memory. `with_flash`: see `find_shape`."""
    start = time.perf_counter()
    shape = find_shape(name, layers, with_flash)
    plan = plan_weights(shape.config, mtp=mtp, layout=ranks.layout)
    planned = time.perf_counter()
    if device.type == "cuda" and plan.device_bytes > 0.97 * count_free(device):
        raise RequestError(
            f"{name} needs {plan.device_bytes / 1e9:.1f} GB for weights; {count_free(device) / 1e9:.1f} GB are free on"
            f" {torch.cuda.get_device_name(device)}. Try --layers N, or more ranks (--tp)"
        )
    weights = make_weights(plan, device, seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    made = time.perf_counter()
    family = find_family(shape.config.model_type)
    model = fetch_place(family.model)(shape.config, weights, fetch_place(family.reference)(ranks))
    weights.finish()
    seconds = {"plan_s": planned - start, "weights_s": made - planned, "model_s": time.perf_counter() - made}
    return Rig(shape, plan, model, device, seconds, ranks)


def count_free(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class ExpertWatcher:
    """Beside operations: keeps each sparse layer's experts i64 [T, topk]."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        chosen: Chosen = super().choose_experts(logits, routing)  # type: ignore[misc]
        whole: Chosen = chosen
        if routing.own is not None:  # those of other ranks are seen, too
            whole = super().choose_experts(logits, routing._replace(own=None))  # type: ignore[misc]
        self.seen.append(whole[0].long())
        return chosen


def watch_experts(operations: type) -> Any:
    """Such operations, watched."""
    return type(f"Watching{operations.__name__}", (ExpertWatcher, operations), {})()


def fetch_kernels(shape: ModelShape) -> Any:
    """The operations in kernels of the shape's family."""
    place = find_family(shape.config.model_type).gpu
    assert place is not None, "a shape of a family without kernels"
    return fetch_place(place)


def choose_arrangement(device: torch.device) -> str:
    """The default one: kernels need a GPU."""
    return BENCH_ARRANGEMENTS[0] if device.type == "cuda" else REFERENCE_ARRANGEMENT


def require_arrangements(names: Iterable[str], device: torch.device, ranks: Ranks = ONE_RANK, shape: str = "") -> None:
    """RequestError for an unknown one, or one that this device, many ranks or the shape cannot run."""
    if shape in FLASH_SHAPES and ranks.layout.tp > 1:
        raise RequestError(f"shape: {shape} is one rank's share; it runs without --tp")
    for name in names:
        is_usual = name in (BENCH_ARRANGEMENTS[0], REFERENCE_ARRANGEMENT)
        if shape in FLASH_SHAPES and name in BENCH_ARRANGEMENTS and not is_usual:
            raise RequestError(
                f"arrangement {name} is of DeepSeek's indexer; of {shape} there is {BENCH_ARRANGEMENTS[0]}"
            )
        if ranks.layout.tp > 1 and not is_usual:
            raise RequestError(f"arrangement {name} is measured on one rank; many run {BENCH_ARRANGEMENTS[0]}")
        if name not in BENCH_ARRANGEMENTS:
            raise RequestError(f"arrangement: expected one of {', '.join(BENCH_ARRANGEMENTS)}, found {name!r}")
        if device.type != "cuda" and name != REFERENCE_ARRANGEMENT:
            raise RequestError(f"arrangement {name} needs a CUDA device; on a CPU there is {REFERENCE_ARRANGEMENT}")
