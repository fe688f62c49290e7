"""The arrangements (a) to (f) of the indexer's projection, each as one operation: hidden state in, key and weights out.

`wk` is 128 FP8 rows, `weights_proj` 64 BF16 rows, and both read what `q_a | kv_a` reads. Whole-model versions of the
same arrangements are in arranged.py. An arm that cannot run here raises ArmError. Next: operation.py times them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench.projection.unfused import TILES, multiply_quantised, multiply_scaled, quantize_activations
from saccade.bench.synthetic import draw_codes, draw_scales
from saccade.errors import SaccadeError
from saccade.kernels.reference import dequantize
from saccade.kernels.types import SCALE_BLOCK, Matrix
from saccade.models.dsa.config import ModelConfig
from saccade.ops.gpu import multiply_few


class ArmError(SaccadeError):
    """An arrangement that cannot be run on this device, or with these versions."""


class Operands(NamedTuple):
    """One set of weights, cold when its turn comes, and the input."""

    x: Tensor  # f32 [T, hidden], normalised
    x16: Tensor  # bf16, for library GEMMs
    qkv_a: Matrix  # FP8 [q_lora + kv_lora + rope, hidden]
    wk: Matrix  # FP8 [dim, hidden]
    weights_proj: Matrix  # bf16 [heads, hidden]
    wk_weights: Matrix  # bf16 [dim + heads, hidden]: the two, wk decoded
    side: "torch.cuda.Stream | None" = None


class Arm(NamedTuple):
    key: str  # "a" to "f"; more than one arm may try one arrangement
    name: str
    run: Callable[
        [Operands], tuple[Tensor, ...]
    ]  # key and weights come last: [T, dim + heads], or [T, dim], [T, heads]
    has_qkv_a: bool = False  # whether q_a | kv_a is part of it


def make_operands(config: ModelConfig, tokens: int, sets: int, device: torch.device, seed: int = 0) -> list[Operands]:
    """`sets` different sets of weights with one input."""
    dice = torch.Generator(device).manual_seed(seed)
    hidden, side = config.hidden_size, torch.cuda.Stream(device) if device.type == "cuda" else None
    x16 = torch.randn(tokens, hidden, generator=dice, device=device).bfloat16()
    x = x16.float()

    shared = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim

    def draw(rows: int) -> Matrix:
        codes = draw_codes(rows * hidden, dice).view(torch.float8_e4m3fn).view(rows, hidden)
        return Matrix(codes, draw_scales((-(-rows // SCALE_BLOCK), -(-hidden // SCALE_BLOCK)), hidden, dice))

    made = []
    for _ in range(sets):
        wk, qkv_a = draw(config.index_head_dim), draw(shared)
        weights = torch.randn(config.index_n_heads, hidden, generator=dice, device=device) * hidden**-0.5
        weights_proj = weights.bfloat16()
        assert wk.scale is not None
        decoded = dequantize(wk.data, wk.scale, wk.group).bfloat16()  # exact: scales are powers of two
        fused = Matrix(torch.cat([decoded, weights_proj]))
        made.append(Operands(x, x16, qkv_a, wk, Matrix(weights_proj), fused, side))
    return made


def multiply_parts(x: Tensor, *parts: Matrix) -> Tensor:
    """f32 [T, rows of all parts], in one launch of the project's own kernels: GEMV for one token, few tokens else."""
    return multiply_few(x, parts)


def project_qkv_a(o: Operands) -> tuple[Tensor, ...]:
    """What every arm stands beside, or holds."""
    return (multiply_parts(o.x, o.qkv_a),)


def scaled_wk(o: Operands) -> Tensor:
    codes, scales = quantize_activations(o.x16)
    try:
        return multiply_scaled(codes, scales, o.wk)[: len(o.x)]
    except (RuntimeError, ValueError) as error:
        raise ArmError(f"torch._scaled_mm: {str(error).strip().partition(chr(10))[0][:120]}") from None


def tiled_wk(o: Operands, tile: tuple[int, int, int]) -> Tensor:
    codes, scales = quantize_activations(o.x16)
    return multiply_quantised(codes, scales, o.wk, len(o.x), tile)


def separate(wk: Callable[[Operands], Tensor]) -> Callable[[Operands], tuple[Tensor, ...]]:
    return lambda o: (wk(o), F.linear(o.x16, o.weights_proj.data))


def on_two_streams(wk: Callable[[Operands], Tensor]) -> Callable[[Operands], tuple[Tensor, ...]]:
    """`weights_proj` beside `wk`; the streams part before and meet after."""

    def run(o: Operands) -> tuple[Tensor, ...]:
        if o.side is None:
            raise ArmError("two streams need a CUDA device")
        here = torch.cuda.current_stream()
        o.side.wait_stream(here)
        with torch.cuda.stream(o.side):
            weights = F.linear(o.x16, o.weights_proj.data)
        key = wk(o)
        here.wait_stream(o.side)
        return key, weights

    return run


def project_separately(o: Operands) -> tuple[Tensor, ...]:
    return multiply_parts(o.x, o.wk), multiply_parts(o.x, o.weights_proj)


def _tiled(tile: tuple[int, int, int]) -> Callable[[Operands], Tensor]:
    return lambda o: tiled_wk(o, tile)


ARMS = (
    Arm("a", "separate: quantise, block-scaled GEMM (torch), BF16 GEMM", separate(scaled_wk)),
    *(Arm("a", f"separate: quantise, block-scaled GEMM (Triton, {t[0]} rows), BF16 GEMM", separate(_tiled(t)))
      for t in TILES),
    Arm("b", "separate: two GEMVs of our own, FP8 and BF16", project_separately),
    Arm("c", "(a) with torch's GEMM, on two streams", on_two_streams(scaled_wk)),
    *(Arm("c", f"(a) with Triton's GEMM of {t[0]} rows, on two streams", on_two_streams(_tiled(t))) for t in TILES),
    Arm("d", "fused BF16: one cuBLAS GEMM", lambda o: (F.linear(o.x16, o.wk_weights.data),)),
    Arm("d", "fused BF16: one GEMV of our own", lambda o: (multiply_parts(o.x, o.wk_weights),)),
    Arm("e", "one launch with q_a | kv_a, BF16 wk", lambda o: (multiply_parts(o.x, o.qkv_a, o.wk_weights),), True),
    Arm("f", "one launch with q_a | kv_a, FP8 wk",
        lambda o: (multiply_parts(o.x, o.qkv_a, o.wk, o.weights_proj),), True),
)  # fmt: skip


def find_error(arm: Arm, o: Operands) -> float:
    """Relative error of an arm's key and weights, against fp64 on the weights as they are."""
    wanted = o.x.double() @ o.wk_weights.data.double().T
    found = torch.cat([part.double() for part in arm.run(o)], 1)[:, -wanted.shape[1] :]
    return float((found - wanted).norm() / wanted.norm())
