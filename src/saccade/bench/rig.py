"""The engine's own decode path on synthetic weights: one model, any number of arrangements of it on the same weights.

It drives the model on ops/gpu.py and `DecodeGraph`; the arrangement "reference" is the model on ops/reference.py. Knows
nothing of timing. Next: steps/decode.py, steps/prefill.py.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.api.settings.resolve import choose_activations
from saccade.api.settings.step_sizes import choose_mixed_tokens
from saccade.bench.projection.arranged import find_ops
from saccade.bench.record import Record, describe_run, name_device
from saccade.bench.room import count_free
from saccade.bench.shapes import FLASH_SHAPES, ModelShape, find_shape
from saccade.bench.steps.eager import EagerSteps, Steps
from saccade.bench.steps.fill import RequestRows, prefill_rows
from saccade.bench.steps.routing import ROUTER, find_experts, give_experts, watch_experts, write_recording
from saccade.bench.synthetic import make_weights, plan_weights
from saccade.engine.graphs import CapturedModel, DecodeGraph
from saccade.errors import RequestError
from saccade.kernels.types import MIXED_TOKENS
from saccade.models.dsa.transformer import Transformer
from saccade.models.registry import fetch_place, find_family
from saccade.ops.step import Cache
from saccade.parallel.ranks import ONE_RANK, Ranks
from saccade.plan.active import count_active_numbers
from saccade.plan.types import Plan

REFERENCE_ARRANGEMENT = "reference"  # the arrangement that is the plain model
WEIGHTS_SHARE = 0.97  # of free memory that weights may take
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
    seed: int = 0  # of the weights
    experts: str = ROUTER  # how tokens choose theirs: see steps/routing.py
    given: Tensor | None = None  # the experts that they take, if not the router's
    activations: str = "exact"  # what products of long prompts see of their inputs
    _made: dict[str, Transformer] = field(default_factory=dict)
    _rows: list[RequestRows] | None = None

    def make_model(self, arrangement: str) -> Transformer:
        """The model as `arrangement` runs it; made once."""
        if arrangement not in self._made:
            with torch.inference_mode():
                self._made[arrangement] = self.model.with_ops(self._make_ops(arrangement))
        return self._made[arrangement]

    def _make_ops(self, arrangement: str) -> Any:
        """Operations of their own."""
        ops: Any
        if arrangement == REFERENCE_ARRANGEMENT:
            plain: Any = type(self.model.ops)
            ops = plain(self.ranks)
        elif arrangement == BENCH_ARRANGEMENTS[0]:
            ops = fetch_kernels(self.shape)(ranks=self.ranks)
        else:
            ops = find_ops(arrangement, self.model)
        ops.activations = self.activations
        if self.given is not None:
            give_experts(ops, self.given)
        return ops

    def make_steps(self, arrangement: str, cache: Cache, batch: int, pages: int) -> Steps:
        """A whole decode step, captured in a graph where the arrangement has one."""
        model = self.make_model(arrangement)
        if arrangement == REFERENCE_ARRANGEMENT or self.device.type != "cuda":
            return EagerSteps(model, cache, batch)
        with torch.inference_mode():
            steps: Steps = DecodeGraph(model, cache, batch_size=batch, pages=pages, device=self.device)
        return steps

    def make_runner(self, arrangement: str, mixed: int = MIXED_TOKENS) -> tuple[Any, int]:
        """What an engine runs the arrangement with, and up to how many tokens its steps have few shapes. `mixed`: see
        CapturedModel."""
        model = self.make_model(arrangement)
        if arrangement == REFERENCE_ARRANGEMENT or self.device.type != "cuda":
            return model, 0
        captured = CapturedModel(model, mixed=mixed)
        return captured, captured.small

    def choose_mixed_chunk(self, chunk: int) -> int:
        """What LLM would have as max_mixed_tokens for the model, with steps of `chunk` tokens."""
        return choose_mixed_tokens(self.device.type, count_active_numbers(self.plan), self.activations, chunk)

    def make_rows(self, context: int) -> list[RequestRows]:
        """Rows of a real prefill, kept for shorter and longer contexts."""
        if self._rows is None or len(self._rows[0].latent) < context:
            model = self.make_model(choose_arrangement(self.device))
            self._rows = prefill_rows(model, self.shape.config, context, self.plan.dtype, self.device)
        return self._rows

    def see_experts(self, run: Callable[[Transformer], object], recording: str | None = None) -> list[Tensor]:
        """Which experts tokens choose in the steps that `run` makes of the model; see `watch_experts`. `recording`:
        where rank 0 writes them."""
        ops = self._make_ops(choose_arrangement(self.device))
        seen = watch_experts(ops)
        with torch.inference_mode():
            run(self.model.with_ops(ops))
        if recording is not None and self.ranks.layout.rank == 0:
            write_recording(recording, seen, self.shape.config)
        return seen

    def describe(self, commit: str | None) -> Record:
        """The conditions that all records of a run have."""
        return {
            **describe_run(self.device, commit),
            "shape": self.shape.name,
            "layers": self.shape.config.num_hidden_layers,
            "notes": list(self.shape.notes),
            "tp": self.ranks.layout.tp,
            "ep": self.ranks.layout.ep,
            "weight_bytes": self.plan.device_bytes,
            "activations": self.activations,
            "experts": self.experts,
            "given_tokens": None if self.given is None else self.given.shape[1],
            "seed": self.seed,
        }


def build_rig(
    name: str, layers: int | None, device: torch.device, seed: int = 0, mtp: bool = False, ranks: Ranks = ONE_RANK,
    with_flash: bool = False, experts: str = ROUTER, activations: str = "auto",
    take_plan: Callable[[Plan], object] = lambda plan: None,
) -> Rig:  # fmt: skip
    """Plan, weights, model. RequestError for experts that cannot be given, or if the device has too little memory.
    `with_flash`: see `find_shape`. `experts`: see `find_experts`. `activations`: as LLM has it. `take_plan` gets the
    plan before weights are made."""
    activations = choose_activations(activations, "auto", "fast" if device.type == "cuda" else "reference")
    if experts != ROUTER and mtp:
        raise RequestError("experts: steps with drafts take the router's; leave out --experts or --speculate")
    if experts != ROUTER and ranks.layout.ep > 1:
        raise RequestError("experts: ranks that divide the experts (--ep) take the router's; leave out --experts")
    start = time.perf_counter()
    shape = find_shape(name, layers, with_flash)
    given = find_experts(experts, shape.config, device)
    plan = plan_weights(shape.config, mtp=mtp, layout=ranks.layout)
    planned = time.perf_counter()
    if plan.device_bytes > WEIGHTS_SHARE * count_free(device):
        raise RequestError(
            f"{name} needs {plan.device_bytes / 1e9:.1f} GB for weights; {count_free(device) / 1e9:.1f} GB are free on"
            f" {name_device(device)}. Try --layers N, or more ranks (--tp)"
        )
    take_plan(plan)
    weights = make_weights(plan, device, seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    made = time.perf_counter()
    family = find_family(shape.config.model_type)
    model = fetch_place(family.model)(shape.config, weights, fetch_place(family.reference)(ranks))
    weights.finish()
    seconds = {"plan_s": planned - start, "weights_s": made - planned, "model_s": time.perf_counter() - made}
    return Rig(shape, plan, model, device, seconds, ranks, seed, experts, given, activations)


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
