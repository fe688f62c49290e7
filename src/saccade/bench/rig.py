"""The engine's own decode path on synthetic weights: one model, any number of arrangements of it on the same weights.

It drives `FastModel` and `DecodeGraph`; the plain model runs as the arrangement "reference". Knows nothing of timing.
Next: decode.py, prefill.py.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saccade.bench.arranged import find_projection
from saccade.bench.eager import EagerSteps, Forward, Steps
from saccade.bench.fill import Rows, prefill_rows
from saccade.bench.shapes import Shape, find_shape
from saccade.bench.synthetic import make_weights, plan_weights
from saccade.cache import Cache
from saccade.errors import RequestError
from saccade.fast import FastModel
from saccade.graphs import DecodeGraph
from saccade.kernels import reference
from saccade.model.transformer import Transformer
from saccade.plan.types import Plan

PLAIN = "reference"  # the arrangement that is the plain model
ARRANGEMENTS = ("packed", "packed-fp8", "fused", "two-streams", "separate", "separate-fp8", PLAIN)


@dataclass
class Rig:
    """The model, and how long it took to build."""

    shape: Shape
    plan: Plan
    model: Transformer
    device: torch.device
    seconds: dict[str, float]
    watch: list[Tensor] | None = None  # receives each sparse layer's experts [B, topk] while it is a list
    _made: dict[str, Forward] = field(default_factory=dict)
    _rows: list[Rows] | None = None

    def make_model(self, arrangement: str) -> Forward:
        """The model as `arrangement` runs it; made once."""
        if arrangement == PLAIN:
            return self.model
        if arrangement not in self._made:
            with torch.inference_mode():
                self._made[arrangement] = FastModel(self.model, find_projection(arrangement, self.model))
        return self._made[arrangement]

    def make_steps(self, arrangement: str, cache: Cache, batch: int, pages: int) -> Steps:
        """A whole decode step, captured in a graph where the arrangement has one."""
        model = self.make_model(arrangement)
        if arrangement == PLAIN or self.device.type != "cuda":
            return EagerSteps(model, cache, batch)
        assert isinstance(model, FastModel)
        with torch.inference_mode():
            steps: Steps = DecodeGraph(model, cache, batch_size=batch, pages=pages, device=self.device)
        return steps

    def make_rows(self, context: int) -> list[Rows]:
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
        steps = EagerSteps(self.model, cache, len(tokens))
        steps.load(tokens, positions, page_table)
        self.watch = []
        try:
            steps.run()
            chosen = torch.stack(self.watch)  # [layers, B, topk]
        finally:
            self.watch = None
        used = torch.zeros(len(chosen), c.n_routed_experts, device=chosen.device)
        return float(used.scatter_(1, chosen.flatten(1), 1.0).sum(1).mean())


def build_rig(name: str, layers: int | None, device: torch.device, seed: int = 0, mtp: bool = False) -> Rig:
    """Plan, weights, model. RequestError if the device has too little memory."""
    start = time.perf_counter()
    shape = find_shape(name, layers)
    plan = plan_weights(shape.config, mtp=mtp)
    planned = time.perf_counter()
    if device.type == "cuda" and plan.device_bytes > 0.97 * count_free(device):
        raise RequestError(
            f"{name} needs {plan.device_bytes / 1e9:.1f} GB for weights; {count_free(device) / 1e9:.1f} GB are free on"
            f" {torch.cuda.get_device_name(device)}. Try --layers N"
        )
    weights = make_weights(plan, device, seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    made = time.perf_counter()
    rigs: list[Rig] = []
    model = Transformer(shape.config, weights, ops=watch_routing(find_ops(device), rigs))
    weights.finish()
    seconds = {"plan_s": planned - start, "weights_s": made - planned, "model_s": time.perf_counter() - made}
    rigs.append(Rig(shape, plan, model, device, seconds))
    return rigs[0]


def count_free(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def find_ops(device: torch.device) -> ModuleType:
    """The fast operations on a GPU, if they are there, else the reference."""
    if device.type == "cuda":
        try:
            return import_module("saccade.kernels.gpu")
        except ModuleNotFoundError:
            pass
    return reference


def watch_routing(ops: ModuleType, rigs: list[Rig]) -> ModuleType:
    """The same operations, but the rig, once it is built, can see which experts are chosen."""
    watched = ModuleType(ops.__name__)
    vars(watched).update({k: v for k, v in vars(ops).items() if not k.startswith("__")})
    route: Callable[..., tuple[Tensor, Tensor]] = ops.route

    def route_seen(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        experts, weights = route(*args, **kwargs)
        if rigs and rigs[0].watch is not None:
            rigs[0].watch.append(experts.long())
        return experts, weights

    vars(watched)["route"] = route_seen
    return watched


def choose_arrangement(device: torch.device) -> str:
    """The default one: kernels need a GPU."""
    return ARRANGEMENTS[0] if device.type == "cuda" else PLAIN


def require_arrangements(names: Iterable[str], device: torch.device) -> None:
    """RequestError for an unknown one, or one that this device cannot run."""
    for name in names:
        if name not in ARRANGEMENTS:
            raise RequestError(f"arrangement: expected one of {', '.join(ARRANGEMENTS)}, found {name!r}")
        if device.type != "cuda" and name != PLAIN:
            raise RequestError(f"arrangement {name} needs a CUDA device; on a CPU there is {PLAIN}")
