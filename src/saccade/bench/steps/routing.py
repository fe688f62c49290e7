"""Which experts a measured step reads: those that the router chooses, or others that are given.

Synthetic weights route as they happen to, and another engine's differently. Experts that are each as likely as any
other are the same number of bytes for both: 256 * (1 - (1 - 8 / 256)^tokens) of 256. With a recording they are even the
same experts. A recording is a NumPy file of integers [sparse layers, tokens, experts of a token], 8 bits wide up to 256
experts, else 16: 464 bytes a token of DeepSeek-V3.2. Next: rig.py, which gives them to a model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.base.values import show
from saccade.bench.record import prepare_file
from saccade.errors import RequestError
from saccade.kernels.types import Chosen, Routing
from saccade.models.dsa.config import ModelConfig

ROUTER, UNIFORM, RECORDED = "router", "uniform", "recorded:"
UNIFORM_TOKENS = 4096  # that are drawn for each layer; beyond them they begin again


class GivenChoice:
    """Instead of `choose_experts`: n tokens take the first n rows of their layer, the same in every step."""

    def __init__(self, ids: Tensor) -> None:
        """ids [sparse layers, tokens, topk]; layers ask in turn. They lie where graphs can read them."""
        self._ids, self._asked = ids, 0

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        ids = self._ids[self._asked % len(self._ids)]
        self._asked += 1
        count = len(logits)
        ids = ids[:count] if count <= len(ids) else ids[torch.arange(count, device=ids.device) % len(ids)]
        # Of the logits, so that what made them is not left out.
        shares = logits.gather(1, ids.long()).sigmoid()
        return ids, shares / shares.sum(1, keepdim=True) * routing.scaling


def find_experts(name: str, config: ModelConfig, device: torch.device) -> Tensor | None:
    """The experts that `name` gives to tokens, i64 [sparse layers, tokens, topk]; None: those of the router.
    RequestError for another name, or a recording of another model."""
    layers, experts, topk = config.mlp_layer_types.count("sparse"), config.n_routed_experts, config.num_experts_per_tok
    if name == ROUTER:
        return None
    if name == UNIFORM:
        dice = torch.Generator(device).manual_seed(0)
        drawn = (torch.rand(UNIFORM_TOKENS, experts, generator=dice, device=device) for _ in range(layers))
        return torch.stack([numbers.topk(topk, 1).indices for numbers in drawn])
    if not name.startswith(RECORDED):
        raise RequestError(f"experts: expected {ROUTER}, {UNIFORM} or {RECORDED}FILE, found {show(name)}")
    return read_recording(name.removeprefix(RECORDED), layers, experts, topk).to(device)


def read_recording(path: str, layers: int, experts: int, topk: int) -> Tensor:
    """i64 [layers, tokens, topk]: the first sparse layers of a recording. RequestError if it is none, or not of such a
    model."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RequestError(f"experts: {path} cannot be read as a NumPy file: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 3 or found.dtype.kind not in "iu":
        raise RequestError(f"experts: {path} is no recording: expected integers [sparse layers, tokens, {topk}]")
    if found.shape[0] < layers or found.shape[1] < 1 or found.shape[2] != topk:
        raise RequestError(
            f"experts: {path}: expected the shape [{layers} or more sparse layers, tokens, {topk}], found"
            f" {list(found.shape)}; record it with the same --shape and --layers"
        )
    ids = torch.from_numpy(found[:layers].astype("int64"))
    if int(ids.min()) < 0 or int(ids.max()) >= experts:
        raise RequestError(
            f"experts: {path} has expert {max(int(ids.max()), -int(ids.min()))}; the model has 0 to {experts - 1}"
        )
    ordered = ids.sort(2).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise RequestError(f"experts: {path} gives an expert to a token twice")
    return ids


def write_recording(path: str, seen: Sequence[Tensor], config: ModelConfig) -> None:
    """What `watch_experts` saw of one step, or of a prompt's steps, as a recording."""
    layers = config.mlp_layer_types.count("sparse")
    ids = torch.stack([torch.cat(list(seen[layer::layers])) for layer in range(layers)])
    with Path(path).open("wb") as file:
        np.save(file, ids.cpu().numpy().astype("uint8" if config.n_routed_experts <= 256 else "uint16"))


def require_recording(path: str | None, cases: int) -> None:
    """RequestError for a recording that cannot be written, or of several batches and contexts."""
    prepare_file("record-experts", path)
    if path is not None and cases > 1:
        raise RequestError(f"record-experts: expected one batch and one context, found {cases} of them")


def give_experts(ops: Any, ids: Tensor) -> None:
    """Let these operations take the experts `ids` of `find_experts`."""
    ops.choose_experts = GivenChoice(ids.to(torch.int32 if ops.kernels == "fast" else torch.int64)).choose_experts


def watch_experts(ops: Any) -> list[Tensor]:
    """Where these operations note from now on which experts they choose: i64 [tokens, topk] of each sparse layer, in
    the order of the steps."""
    choose, seen = ops.choose_experts, list[Tensor]()

    def note(logits: Tensor, routing: Routing) -> Chosen:
        chosen: Chosen = choose(logits, routing)
        # Those of other ranks are seen, too.
        whole = chosen if routing.own is None else choose(logits, routing._replace(own=None))
        seen.append(whole[0].long())
        return chosen

    ops.choose_experts = note
    return seen


def count_distinct(seen: Sequence[Tensor]) -> float | None:
    """Distinct experts that a sparse layer reads in a step, on average; None without sparse layers."""
    counts = [len(experts.unique()) for experts in seen]
    return sum(counts) / len(counts) if counts else None
