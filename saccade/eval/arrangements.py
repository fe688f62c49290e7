"""Ways to run the indexer's projection, of which only the arithmetic differs.

Engines run `wk` and `weights_proj` fused in BF16 or separately in FP8, and keep index keys in BF16 or FP8. Here each is
a drop-in for `Indexer.project` (and, for FP8 keys, for `Indexer.rotate`, the last step before a query or key is used),
so that everything else of the model stays fp32. Used by probe.py; knows no files and no requests.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.kernels.matrix import Matrix
from saccade.kernels.reference import Rotation, decode, linear
from saccade.model.indexer import Indexer

E4M3_MAX = 448.0
LEAST = 1e-4  # of a vector's largest number, before its scale is taken (DeepSeek-V3.2-Exp, kernel.py)


class Projection(NamedTuple):
    """What a checkpoint holds of one indexer."""

    wk: Matrix  # [dim, hidden], FP8 with its scale
    weights_proj: Tensor  # [heads, hidden], f32 (from BF16: exact)


class Arrangement(NamedTuple):
    name: str
    project: Callable[[Tensor, Projection], Tensor]  # x [T, hidden] -> f32 [T, dim + heads]
    has_fp8_keys: bool = False


def project_fp32(x: Tensor, p: Projection) -> Tensor:
    return torch.cat([linear(x, p.wk), linear(x, p.weights_proj)], dim=1)


def project_fused_bf16(x: Tensor, p: Projection) -> Tensor:
    """One GEMM: BF16 in, fp32 accumulated and out."""
    fused = torch.cat([decode(p.wk), p.weights_proj]).bfloat16()
    return linear(x.bfloat16(), fused, torch.float32)


def project_separately(x: Tensor, p: Projection) -> Tensor:
    """FP8 `wk` on activations quantised by groups of 128, as unfused engines run it; `weights_proj` in BF16."""
    groups = x.unflatten(1, (-1, 128)) if x.shape[1] % 128 == 0 else x[:, None]
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST) / E4M3_MAX
    codes = (groups / scale).to(torch.float8_e4m3fn)
    k = linear((codes.float() * scale).flatten(1), p.wk)
    return torch.cat([k, linear(x.bfloat16(), p.weights_proj.bfloat16(), torch.float32)], dim=1)


ARRANGEMENTS = (
    Arrangement("fp32", project_fp32),
    Arrangement("fused BF16", project_fused_bf16),
    Arrangement("separate, FP8 wk and activations", project_separately),
    Arrangement("fused BF16, FP8 index keys", project_fused_bf16, has_fp8_keys=True),
)


def round_to_fp8(x: Tensor) -> Tensor:
    """Each vector in e4m3 with one power-of-two scale, 2^ceil(log2(amax / 448)), as numbers again."""
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=LEAST)
    scale = torch.exp2(torch.ceil(torch.log2(amax / E4M3_MAX)))
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


@contextmanager
def arranged(indexer: Indexer, projection: Projection, arrangement: Arrangement) -> Iterator[Indexer]:
    """The indexer, running in this arrangement while the context is open."""
    before = dict(vars(indexer))
    rotate = type(indexer).rotate

    def project(x: Tensor) -> Tensor:
        return arrangement.project(x, projection)

    def rotate_and_round(x: Tensor, rotation: Rotation) -> Tensor:
        return round_to_fp8(rotate(indexer, x, rotation))

    vars(indexer)["project"] = project
    if arrangement.has_fp8_keys:
        vars(indexer)["rotate"] = rotate_and_round
    try:
        yield indexer
    finally:
        vars(indexer).clear()
        vars(indexer).update(before)
