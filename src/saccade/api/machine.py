"""What this machine has, and how a model runs on it: plain torch, or the kernels of a GPU.

settings.py decides by what is found here. Knows no requests. Next: llm.py; ops/gpu.py, the table of kernels;
engine/graphs.py, recorded steps.
"""

from typing import NamedTuple

import torch

from saccade.base.limits import find_free_memory
from saccade.config.model import ModelConfig
from saccade.engine.speculate import Drafter, Model, Run, run_eagerly
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference
from saccade.weights.loader import Weights


class Built(NamedTuple):
    """A model, ready for an engine."""

    model: Transformer
    runner: Model  # what the engine runs: the model, or its captured steps
    small: int  # tokens of a step up to which that has few shapes
    run_drafts: Run | None  # steps with drafts; None without an MTP layer, or if none are wanted


def build_model(config: ModelConfig, weights: Weights, kernels: str, drafts: bool = False) -> Built:
    """Triton is imported only where it is used."""
    if kernels == "reference":
        model = Transformer(config, weights, Reference())
        return Built(model, model, 0, run_eagerly(make_drafter(model)) if drafts and model.mtp else None)
    from saccade.engine.graphs import MOST_CAPTURED, MOST_DRAFTED, CapturedDrafts, CapturedModel
    from saccade.ops.gpu import Gpu

    model = Transformer(config, weights, Gpu())
    if not (drafts and model.mtp):
        return Built(model, CapturedModel(model), MOST_CAPTURED, None)
    return Built(model, CapturedModel(model), MOST_DRAFTED, CapturedDrafts(make_drafter(model)))


def make_drafter(model: Transformer) -> Drafter:
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
