"""The arrangements (a) to (f) of the indexer's projection inside the whole model: what a FastModel takes for its own.

All read the same weights. Those that keep `wk` in FP8 get it quantised again from the BF16 parameter, by blocks of
128x128 with power-of-two scales, which changes no cost. Next: arms.py has each as a single operation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench.unfused import TILES, multiply_blocks, quantize_activations
from saccade.fast import ProjectInputs, project_packed
from saccade.fast_step import take_norm
from saccade.kernels import gpu
from saccade.kernels.linear.few import project
from saccade.kernels.types import Matrix
from saccade.kernels.residual import Residual, plain
from saccade.model.decoder import DecoderLayer
from saccade.model.transformer import Transformer

Inputs = tuple[Tensor, Tensor, Tensor]
BLOCK = 128
LIBRARY_TILE = TILES[1]  # 32 rows: among the Triton tiles the fastest for 128 rows at batch 1


def split(x: Tensor, layer: DecoderLayer) -> Inputs:
    a = layer.attention
    assert a.indexer is not None
    low, key, weights = x.split([a.q_lora + a.kv_lora + a.rope, a.indexer.dim, a.indexer.heads], dim=1)
    return low, key, weights


def quantize(w: Tensor) -> Matrix:
    """e4m3 codes with a power-of-two scale for each 128x128 block of w [128 n, k]."""
    blocks = w.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [n, 128, k / 128, 128]
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448.0)))
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return Matrix(codes.reshape(w.shape), scale)


class Stored:
    """The FP8 `wk` and the BF16 `weights_proj` of each layer."""

    def __init__(self, model: Transformer):
        self.parts: dict[int, tuple[Matrix, Tensor]] = {}
        for layer in model.layers:
            indexer = layer.attention.indexer
            if indexer is not None:
                w = indexer.wk_weights_proj
                self.parts[layer.attention.layer] = quantize(w[: indexer.dim]), w[indexer.dim :].contiguous()

    def of(self, layer: DecoderLayer) -> tuple[Matrix, Tensor]:
        return self.parts[layer.attention.layer]


def project_fused(layer: DecoderLayer, x: Residual) -> Inputs:
    """(d): the BF16 parameter in one launch of its own."""
    a, norm = layer.attention, take_norm(layer.input_norm)
    assert a.indexer is not None
    both = project(x, [a.indexer.wk_weights_proj], norm)
    key, weights = both.split([a.indexer.dim, a.indexer.heads], dim=1)
    return project(x, [a.qkv_a_proj], norm), key, weights


def find_projection(name: str, model: Transformer) -> ProjectInputs:
    """The projection of an arrangement, by its name."""
    if name == "packed":
        return project_packed
    if name == "fused":
        return project_fused
    stored = Stored(model)

    def project_packed_fp8(layer: DecoderLayer, x: Residual) -> Inputs:
        """(f): one launch, `wk` in FP8."""
        wk, weights = stored.of(layer)
        return split(project(x, [layer.attention.qkv_a_proj, wk, weights], take_norm(layer.input_norm)), layer)

    def project_separately(layer: DecoderLayer, x: Residual) -> Inputs:
        """(b): three launches of our own."""
        (wk, weights), norm = stored.of(layer), take_norm(layer.input_norm)
        low = project(x, [layer.attention.qkv_a_proj], norm)
        return low, project(x, [wk], norm), project(x, [weights], norm)

    def project_as_others(layer: DecoderLayer, x: Residual) -> Inputs:
        """(a): activations quantised for `wk`, a block-scaled GEMM, and a BF16 GEMM of the library."""
        wk, weights = stored.of(layer)
        low = project(x, [layer.attention.qkv_a_proj], take_norm(layer.input_norm))
        x16 = gpu.rms_norm(plain(x), layer.input_norm.weight, layer.input_norm.eps).bfloat16()
        key = multiply_blocks(*quantize_activations(x16), wk, len(plain(x)), LIBRARY_TILE)
        return low, key.float(), F.linear(x16, weights).float()

    side = torch.cuda.Stream(model.embed_tokens.device) if model.embed_tokens.is_cuda else None

    def project_on_two_streams(layer: DecoderLayer, x: Residual) -> Inputs:
        """(c): the two GEMMs of (a) on two streams."""
        assert side is not None, "two streams need a CUDA device"
        wk, weights = stored.of(layer)
        low = project(x, [layer.attention.qkv_a_proj], take_norm(layer.input_norm))
        x16 = gpu.rms_norm(plain(x), layer.input_norm.weight, layer.input_norm.eps).bfloat16()
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            head_weights = F.linear(x16, weights).float()
        key = multiply_blocks(*quantize_activations(x16), wk, len(plain(x)), LIBRARY_TILE).float()
        here.wait_stream(side)
        return low, key, head_weights

    found: dict[str, ProjectInputs] = {
        "packed-fp8": project_packed_fp8,
        "separate": project_separately,
        "separate-fp8": project_as_others,
        "two-streams": project_on_two_streams,
    }
    return found[name]
