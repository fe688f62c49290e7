"""What this machine has, and how a model runs on it: plain torch, or the kernels of a GPU.

The settings are decided by what is found here. Knows no requests. Next: llm.py; ops/gpu.py, the table of kernels;
engine/graphs.py, recorded steps.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.base.limits import find_free_memory
from saccade.config.file import Config
from saccade.engine.model import Model, Runner
from saccade.engine.ranks.compare import Compared
from saccade.engine.speculate import Drafter, EagerDrafts, RunStep
from saccade.models.registry import fetch_place, find_family
from saccade.ops.interface import Ops
from saccade.parallel.ranks import ONE_RANK, Ranks
from saccade.weights.weights import Weights


class Built(NamedTuple):
    """A model, ready for an engine."""

    model: Model
    plain: Ops  # the family's operations in plain torch
    runner: Runner  # what the engine runs: the model, or its captured steps
    small: int  # tokens of a step up to which that has few shapes
    run_drafts: RunStep | None  # steps with drafts; None without an MTP layer, or if none are wanted


def build_model(
    config: Config, weights: Weights, kernels: str, drafts: bool = False, ranks: Ranks = ONE_RANK,
    activations: str = "exact",
) -> Built:  # fmt: skip
    """The family's forward pass on its operations, over a share of the parameters if there are several `ranks`. Triton
    is imported only where it is used."""
    family = find_family(config.model_type)
    make: Callable[..., Model] = fetch_place(family.model)
    plain: Ops = fetch_place(family.reference)(ranks=ranks, activations=activations)
    if kernels == "reference":
        model = make(config, weights, plain)
        return Built(model, plain, model, 0, EagerDrafts(make_drafter(model)) if drafts and model.mtp else None)
    from saccade.engine.graphs import CapturedDrafts, CapturedModel

    assert family.gpu is not None, "settings refuse kernels that a family does not have"
    model = make(config, weights, fetch_place(family.gpu)(ranks=ranks, activations=activations))
    run_drafts = CapturedDrafts(make_drafter(model)) if drafts and model.mtp else None
    captured = CapturedModel(model)
    return Built(model, plain, captured, captured.small, run_drafts)


def compare_ranks(built: Built, held: Mapping[str, Tensor], ranks: Ranks) -> tuple[Built, Compared]:
    """The same model, on operations whose results ranks can compare; without CUDA graphs."""
    compared = Compared(built.model.ops, held, ranks)
    model = built.model.with_ops(compared)
    run_drafts = None if built.run_drafts is None else EagerDrafts(make_drafter(model))
    return built._replace(runner=model, small=0, run_drafts=run_drafts), compared


def make_drafter(model: Model) -> Drafter:
    """Of a model with an MTP layer."""
    config = model.config
    assert model.mtp is not None
    return Drafter(model, model.mtp, config.index_share_for_mtp_iteration, config.max_position_embeddings)


def find_capability(device: str) -> int:
    """Ten times a GPU's compute capability; 0 of a CPU."""
    if not device.startswith("cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def find_free_bytes(device: str) -> int:
    """Free memory of the device. On a CPU, what system, containers and ulimits leave."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else find_free_memory()
