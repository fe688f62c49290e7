"""The MTP layer in fused kernels: model/mtp.py's `forward` and `logits`, where fast.py's model runs.

Two more drafts of one request are 42 more launches of a step of 1,077 (`bench decode --speculate 3,5`). The layer
itself is the specification: a test compares the two. Knows nothing of drafts. Next: speculate.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.fast import MOST, FastModel, is_covered
from saccade.fast_step import Step, select_everything, take_norm
from saccade.kernels import gpu
from saccade.kernels.embed import begin_step
from saccade.kernels.linear.few import project
from saccade.kernels.reference import Selection
from saccade.kernels.linear.gemv import multiply_into
from saccade.kernels.residual import Residual, plain

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache


class FastMtp:
    """Weights of `float32` run as the layer itself says."""

    def __init__(self, fast: FastModel):
        """`fast` has an MTP layer."""
        assert fast.mtp is not None
        self._fast, self._mtp = fast, fast.mtp
        self._is_covered = is_covered(fast.mtp.layer)

    def forward(
        self,
        batch: "Batch",
        next_tokens: Tensor,
        hidden: Tensor,
        cache: "Cache",
        selection: Selection | None = None,
    ) -> tuple[Tensor, Selection]:
        """See Mtp.forward."""
        m = self._mtp
        if not self._is_covered:
            return m.forward(batch, next_tokens, hidden, cache, selection)
        norm = take_norm(m.embed_norm)
        embedded, rotation = begin_step(next_tokens, batch.positions, m.embed_tokens, self._fast.turns, norm)
        both = torch.cat([m.embed_norm(plain(embedded)), m.hidden_norm(hidden)], dim=1)  # [T, 2 * hidden]
        x: Residual
        if len(both) == 1:  # for two, eh_proj's 205 MB side by side would take 97 us instead of 58
            x = multiply_into(both, m.eh_proj, torch.zeros_like(hidden), take_norm(m.layer.input_norm))
        else:
            x = project(both, [m.eh_proj]) if len(both) <= MOST else gpu.linear(both, m.eh_proj)
        step = Step(batch, cache, rotation, select_everything(batch, self._fast.config.index_topk))
        x, selection = self._fast.run_layer(m.layer, x, step, selection, take_norm(m.norm))
        return m.norm(plain(x)), selection

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] that `forward` returned."""
        if len(rows) > MOST or not self._is_covered:
            return self._mtp.logits(rows)
        return project(rows, [self._mtp.head])
