"""How a step begins, of the main model as of the MTP layer. Next: transformer.py, mtp.py."""

from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.types import Norm
from saccade.ops.interface import Embedding, Ops, Residual, Rotary
from saccade.ops.step import Batch, Cache, Step


def begin_step(
    ops: Ops, batch: Batch, cache: Cache, tokens: Tensor, embedding: Embedding, rotary: Rotary, following: Norm,
    topk: int,
) -> tuple[Residual, Step]:  # fmt: skip
    """Rows of `embedding`, and what all layers of the step have in common."""
    x, rotation = ops.begin(tokens, batch.positions, embedding, rotary, following)
    context = batch.page_table.shape[1] * PAGE
    everything = ops.select_all(batch.positions, context) if context <= topk else None
    return x, Step(batch, cache, rotation, everything)
