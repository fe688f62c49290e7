"""The arrangements (a) to (f) of the indexer's projection inside the whole model: each overrides one operation.

All read the same weights. Those that keep `wk` in FP8 get it quantised again from the BF16 parameter, by blocks of
128x128 with power-of-two scales, which changes no cost. Next: arms.py has each as a single operation.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench.projection.unfused import TILES, multiply_quantised, quantize_activations
from saccade.kernels.residual import Input, get_values
from saccade.kernels.types import DECODE_TOKENS, SCALE_BLOCK, Matrix, Norm
from saccade.models.dsa.transformer import Transformer
from saccade.ops.gpu import Gpu, multiply_few, normalize_rows
from saccade.ops.interface import Fused, Ops, Residual

LIBRARY_TILE = TILES[1]  # 32 rows: among the Triton tiles the fastest for 128 rows at batch 1


def quantize(w: Tensor) -> Matrix:
    """e4m3 codes with a power-of-two scale for each 128x128 block of w [128 n, k]."""
    blocks = w.float().unflatten(1, (-1, SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK))  # [n, 128, k / 128, 128]
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448.0)))
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return Matrix(codes.reshape(w.shape), scale)


class ArrangedGpu(Gpu):
    """The operations of a GPU, in which few tokens' qkv_a, `wk` and `weights_proj` are projected by `project_parts`."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.parts: dict[int, tuple[Matrix, Matrix]] = {}  # by the fused parameter: `wk` in FP8, `weights_proj`
        for layer in model.layers:
            if layer.attention.indexer is not None:
                fused = layer.attention.indexer.projection
                w, dim = fused.matrix.data, fused.rows[0]
                self.parts[id(w)] = quantize(w[:dim]), Matrix(w[dim:].contiguous())

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        parts = self.parts.get(id(weights[-1].matrix.data))
        if parts is None or len(get_values(x.value)) > DECODE_TOKENS:
            return super().project(x, norm, weights)
        return self.project_parts(x.prepared_for(norm), norm, weights[0].matrix, *parts)

    def project_parts(self, x: Input, norm: Norm, qkv_a: Matrix, wk: Matrix, weights_proj: Matrix) -> list[Tensor]:
        """Low-rank queries and latents, index keys, head weights: f32 [T, rows] each."""
        raise NotImplementedError


class PackedFp8(ArrangedGpu):
    """(f): one launch, `wk` in FP8."""

    def project_parts(self, x: Input, norm: Norm, qkv_a: Matrix, wk: Matrix, weights_proj: Matrix) -> list[Tensor]:
        parts = [qkv_a, wk, weights_proj]
        return list(multiply_few(x, parts, norm).split([w.data.shape[0] for w in parts], dim=1))


class Fused16(Gpu):
    """(d): the BF16 parameter in one launch of its own."""

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        return [part for w in weights for part in Gpu.project(self, x, norm, [w])]


class Separate(ArrangedGpu):
    """(b): three launches of our own."""

    def project_parts(self, x: Input, norm: Norm, qkv_a: Matrix, wk: Matrix, weights_proj: Matrix) -> list[Tensor]:
        return [multiply_few(x, [w], norm) for w in (qkv_a, wk, weights_proj)]


class SeparateFp8(ArrangedGpu):
    """(a): activations quantised for `wk`, a block-scaled GEMM, and a BF16 GEMM of the library."""

    def project_parts(self, x: Input, norm: Norm, qkv_a: Matrix, wk: Matrix, weights_proj: Matrix) -> list[Tensor]:
        low, x16 = multiply_few(x, [qkv_a], norm), normalize_rows(get_values(x), norm).bfloat16()
        key = multiply_quantised(*quantize_activations(x16), wk, len(x16), LIBRARY_TILE)
        return [low, key.float(), F.linear(x16, weights_proj.data).float()]


class TwoStreams(ArrangedGpu):
    """(c): the two GEMMs of (a) on two streams."""

    def __init__(self, model: Transformer):
        super().__init__(model)
        assert model.embed_tokens.rows.is_cuda, "two streams need a CUDA device"
        self.side = torch.cuda.Stream(model.embed_tokens.rows.device)

    def project_parts(self, x: Input, norm: Norm, qkv_a: Matrix, wk: Matrix, weights_proj: Matrix) -> list[Tensor]:
        low, x16 = multiply_few(x, [qkv_a], norm), normalize_rows(get_values(x), norm).bfloat16()
        here = torch.cuda.current_stream()
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            head_weights = F.linear(x16, weights_proj.data).float()
        key = multiply_quantised(*quantize_activations(x16), wk, len(x16), LIBRARY_TILE).float()
        here.wait_stream(self.side)
        return [low, key, head_weights]


ARRANGED: dict[str, type[ArrangedGpu]] = {
    "packed-fp8": PackedFp8,
    "separate": Separate,
    "separate-fp8": SeparateFp8,
    "two-streams": TwoStreams,
}


def find_ops(name: str, model: Transformer) -> Ops:
    """The operations of an arrangement, by its name."""
    if name in ("packed", "fused"):
        return Gpu() if name == "packed" else Fused16()
    return ARRANGED[name](model)
