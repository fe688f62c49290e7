"""Ways to run the indexer's projection. Only their arithmetic differs.

Engines run `wk` and `weights_proj` fused in BF16 or separately in FP8, and keep index keys in BF16 or FP8. Here each is
an override of one or two of the reference operations, so that everything else of the model stays fp32. Used by
probe.py; knows no files and no requests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.write import E4M3_MAX, quantize_blocks
from saccade.kernels.reference import LEAST_AMAX, decode, linear, quantize_rows
from saccade.kernels.types import Matrix, Norm, Rotation
from saccade.models.dsa.transformer import Transformer
from saccade.ops.interface import Fused, Residual
from saccade.ops.reference import Reference


class Projection(NamedTuple):
    """What a checkpoint holds of one indexer."""

    wk: Matrix  # [dim, hidden], as it is stored: FP8 with its scale, or plain
    weights_proj: Tensor  # [heads, hidden], f32


class Arrangement(NamedTuple):
    name: str
    project: Callable[[Tensor, Projection], Tensor]  # x [T, hidden] -> f32 [T, dim + heads]
    round_keys: Callable[[Tensor], Tensor] | None = None  # of queries and keys [..., dim], after RoPE
    index_cache: str = "bf16"  # of the Cache that it runs on
    latent_cache: str = "bf16"


def project_fp32(x: Tensor, p: Projection) -> Tensor:
    return torch.cat([linear(x, p.wk), linear(x, p.weights_proj)], dim=1)


def project_fused(x: Tensor, p: Projection) -> Tensor:
    """One product with the BF16 parameter `wk_weights_proj`, activations fp32: what models/dsa does."""
    return linear(x, torch.cat([decode(p.wk), p.weights_proj]).bfloat16(), torch.float32)


def project_fused_bf16(x: Tensor, p: Projection) -> Tensor:
    """The same on tensor cores: activations rounded to BF16 too, fp32 accumulated and out."""
    return project_fused(x.bfloat16(), p)


def project_unfused(x: Tensor, p: Projection) -> Tensor:
    """FP8 `wk` on activations quantised by groups of 128, as unfused engines run it; `weights_proj` in BF16."""
    groups = x.unflatten(1, (-1, 128)) if x.shape[1] % 128 == 0 else x[:, None]
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX) / E4M3_MAX
    x8 = (groups / scale).to(torch.float8_e4m3fn)
    wk = p.wk
    if wk.scale is None:  # a plain wk, as an unfused engine would have to store it
        codes, scales = quantize_blocks(wk.data.float().cpu())
        wk = Matrix(codes.to(x.device), scales.to(x.device))
    k = linear((x8.float() * scale).flatten(1), wk)
    return torch.cat([k, linear(x.bfloat16(), p.weights_proj.bfloat16(), torch.float32)], dim=1)


def round_to_fp8(x: Tensor) -> Tensor:
    """Each vector in e4m3 with one power-of-two scale, as numbers again: what an FP8 cache holds, in any cache."""
    codes, scales = quantize_rows(x)
    return codes.float() * scales[..., None]


def turn_and_round(x: Tensor) -> Tensor:
    """The Hadamard rotation of DeepSeek's own code in front: it spreads outliers, and cancels in q . k."""
    h = torch.ones(1, 1, device=x.device)
    while len(h) < x.shape[-1]:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return round_to_fp8(x.float() @ h / len(h) ** 0.5)


ARRANGEMENTS = (
    Arrangement("fp32", project_fp32),
    Arrangement("fused BF16", project_fused),
    Arrangement("fused BF16, BF16 activations", project_fused_bf16),
    Arrangement("separate, FP8 wk and activations", project_unfused),
    Arrangement("fused BF16, FP8 index q and k", project_fused, round_to_fp8),
    Arrangement("the same, Hadamard-rotated first", project_fused, turn_and_round),
)
# With the product's own FP8 cache; equal to the fifth, bit for bit.
CACHED_FP8 = Arrangement("fused BF16, the FP8 index cache", project_fused, index_cache="fp8")
CACHED_LATENTS = Arrangement("fused BF16, the FP8 latent cache", project_fused, latent_cache="fp8")


class ArrangedReference(Reference):
    """The reference operations, in which the indexer's projection is an arrangement's."""

    def __init__(self, model: Transformer, projections: Mapping[int, Projection], arrangement: Arrangement) -> None:
        """`projections` of the layers that are arranged; all other layers compute as they are."""
        super().__init__()
        self.arrangement = arrangement
        self._projections: dict[int, Projection] = {}  # by the fused parameter
        for layer, projection in projections.items():
            indexer = model.layers[layer].attention.indexer
            assert indexer is not None, f"layer {layer} has no indexer"
            self._projections[id(indexer.projection.matrix.data)] = projection

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        found = []
        for w in weights:
            projection = self._projections.get(id(w.matrix.data))
            if projection is None:
                found += super().project(x, norm, [w])
            else:
                found += self.arrangement.project(self.normalize(x, norm), projection).split(w.rows, dim=1)
        return found

    def rotate_index(self, x: Tensor, rotation: Rotation, is_interleaved: bool) -> Tensor:
        turned, round_keys = super().rotate_index(x, rotation, is_interleaved), self.arrangement.round_keys
        return turned if round_keys is None else round_keys(turned)
