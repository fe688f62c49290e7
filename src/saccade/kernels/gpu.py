"""The operations of reference.py for a GPU: the same names and meanings, as kernels where that saves time.

The model runs on them where fast.py does not cover its weights, and is what tests compare fast.py with, which takes
some of them itself. Products of float32 weights, and all that is small, are reference.py's own. Next: gemm.py,
experts.py.
"""

import torch
from torch import Tensor

from saccade.kernels import PAGE, attend, reference
from saccade.kernels.attention.dense import dense_attention
from saccade.kernels.moe.grouped_gemm import expert_mlp as expert_mlp_of_many
from saccade.kernels.linear.gemm import linear, mlp
from saccade.kernels.types import Matrix
from saccade.kernels.activations import write
from saccade.kernels.moe.packed import packed_experts
from saccade.kernels.reference import (
    Rotation,
    Selection,
    dequantize,
    find_slots,
    layer_norm,
    quantize_rows,
    rotate,
    select_all,
    silu_and_mul,
    write_rows,
)
from saccade.kernels.moe.route import route
from saccade.kernels.indexer.logits import index_logits
from saccade.kernels.indexer.select import select
from saccade.kernels.linear.split_k import MOST
from saccade.kernels.attention.sparse_prefill import is_taken, sparse_attention_of_many

__all__ = [
    "Rotation", "Selection", "dequantize", "expert_mlp", "find_slots", "index_logits", "layer_norm", "linear", "mlp",
    "quantize_rows", "rms_norm", "rotate", "route", "select", "select_all", "silu_and_mul", "sparse_attention",
    "write_rows",
]  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, n] / rms(x) * weight, in one pass."""
    if x.ndim != 2 or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.shape[0] == 0:
        return reference.rms_norm(x, weight, eps)
    return write(x, norm=(weight, eps), plain=True).plain


def expert_mlp(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """[T, hidden]: the sum over a token's experts of weight * mlp(x), always in the order of `experts` [T, topk]."""
    few = x.shape[0] <= MOST and gate_up.code in ("e2m1", "int4", "uint4") and gate_up.scale is not None
    return (packed_experts if few else expert_mlp_of_many)(x, experts, weights, gate_up, down)


def sparse_attention(
    q: Tensor, latent: Tensor, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int
) -> Tensor:
    """Absorbed MLA [T, heads, width] over the selection; where it holds every position, tokens share what they read."""
    if q.shape[0] > MOST and selection.shape[1] == page_table.shape[1] * PAGE:
        positions = (selection >= 0).sum(1) - 1
        return dense_attention(q, latent, page_table, request, positions, scale, width)
    if q.shape[0] > MOST and is_taken(q.shape[1], latent, width):
        return sparse_attention_of_many(q, latent, page_table, request, selection, scale, width)
    return attend.sparse_attention(q, latent, page_table, request, selection, scale, width)
