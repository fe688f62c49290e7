"""The operations that the toy needs beside those of every family."""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.kernels import reference as plain
from saccade.kernels.types import CacheRows, Norm
from saccade.ops.interface import Residual
from saccade.ops.reference import Reference
from saccade.ops.step import Batch, Step


class Mixer(NamedTuple):
    """How a block reads the two streams, and how it writes to them."""

    read: Tensor  # f32 [2]
    write: Tensor  # f32 [2]


class ToyReference(Reference):
    def write_keys(self, step: Step, key: Tensor, rows: CacheRows) -> None:
        """With an RMS norm, where every other family has a LayerNorm."""
        assert rows.key_norm is not None and rows.keys is not None
        k = plain.rms_norm(key, rows.key_norm.weight, rows.key_norm.eps)
        k = self.rotate_index(k, step.rotation, rows.key_norm.is_interleaved)
        self.store_keys(k, step.batch.slots, rows.keys)

    def mix(self, streams: Tensor, read: Tensor, following: Norm) -> Residual:
        """Streams f32 [T, 2, hidden], as the block reads them that begins with the norm `following`."""
        return Residual(torch.einsum("tsh,s->th", streams, read), following)

    def spread(self, streams: Tensor, before: Residual, after: Residual, write: Tensor) -> Tensor:
        """The streams with what a block has added."""
        return streams + (after.value - before.value)[:, None] * write[:, None]

    def scan(self, batch: Batch, x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
        """y[t] = decay * y[t - 1] + x[t], f32 [T, n], from each request's state on [requests + 1, n], which is then its
        last y. Token by token, so that chunks change no bit."""
        assert batch.state_slots is not None
        y, place = torch.zeros_like(x), batch.state_slots[batch.request]
        for t in (batch.slots >= 0).nonzero().flatten().tolist():
            y[t] = state[place[t]] = decay * state[place[t]] + x[t]
        return y
