"""The operations that GLM-5.3-Flash needs beside those of every family.

As ops/interface.py, in whose words the rest of the model is written. Next: operations.py defines each exactly, gpu.py
says with which kernel.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from saccade.kernels.recurrent.delta import DeltaState, DeltaWeights
from saccade.kernels.types import Matrix, Norm, StreamMixer
from saccade.ops.interface import Fused, Ops, Residual
from saccade.ops.step import Step


class Recurrence(NamedTuple):
    """A recurrent layer's parameters."""

    in_proj: Fused  # queries with keys and values, beta, the low ranks of decay and output gate
    f_b: Matrix  # [heads * dim, dim]: decay from its low rank
    g_b: Matrix  # [heads * dim, dim]: output gate from its low rank
    delta: DeltaWeights
    norm: Norm  # of a head's output


class FlashOps(Ops, Protocol):
    """Operations whose residual may be streams, several of each token: a block reads a mean of them, and its output is
    added to all, while they are mixed. The residual of the MTP layer is one stream: there all is as in Ops."""

    def enter(self, x: Residual, mixer: StreamMixer, norm: Norm) -> Residual:
        """Streams, with what the block that begins with `norm` reads of them. In front of the first block all are the
        embedding."""
        ...

    def merge(self, x: Residual) -> Residual:
        """One stream, the mean of all."""
        ...

    def recur(self, step: Step, x: Residual, norm: Norm, layer: Recurrence, state: DeltaState) -> Tensor:
        """f32 [T, heads * dim] for `add_projection`; each request's state goes on."""
        ...
