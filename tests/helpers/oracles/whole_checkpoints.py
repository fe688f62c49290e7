"""All tensors of a checkpoint, all parameters that are loaded from it, and whether two such are the same bits."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from saccade.checkpoint.open import open_model
from saccade.plan import make_plan, prove
from saccade.weights.loader import load


def tensors_of(root: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(root.glob("*.safetensors")) for name, t in load_file(file).items()}


def parameters_of(root: Path, dtype: str) -> dict[str, Tensor]:
    plan = make_plan(*open_model(root), dtype=dtype)
    assert prove(plan) == []
    weights = load(plan)
    return {name: weights.take(name) for name in weights.names()}


def bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]).equal(bits(b[n])) for n in a
    )
