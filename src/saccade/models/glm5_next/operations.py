"""The operations that GLM-5.3-Flash needs beside those of every family, in plain torch: the specification.

Residual streams (mHC, manifold-constrained hyper-connections), whose weights depend on the token; and the recurrence of
kernels/recurrent/delta.py. Next: gpu.py, the same operations as kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.kernels import reference as plain
from saccade.kernels.recurrent.delta import DeltaState, find_decay, run_delta
from saccade.kernels.types import Matrix, Norm, StreamMixer
from saccade.models.glm5_next.interface import Recurrence
from saccade.ops.interface import Residual
from saccade.ops.reference import Reference
from saccade.ops.step import Step


class Streams(NamedTuple):
    """The residual of this family: several streams of each token, and how a block under way reads and writes them."""

    values: Tensor  # f32 [T, streams, hidden]
    read: Tensor | None = None  # f32 [T, hidden]: what the block takes
    post: Tensor | None = None  # f32 [T, streams]: of the block's output
    comb: Tensor | None = None  # f32 [T, streams before, streams after]


class FlashReference(Reference):
    """Reference, and what interface.py adds."""

    def enter(self, x: Residual, mixer: StreamMixer, norm: Norm) -> Residual:
        n, value = mixer.streams, x.value
        streams = value.values if isinstance(value, Streams) else value[:, None].expand(-1, n, -1)
        flat = streams.flatten(1)
        flat = flat * torch.rsqrt(flat.square().mean(1, keepdim=True) + mixer.norm_eps)
        raw = plain.linear(flat, Matrix(mixer.fn))
        scale = torch.cat([part.expand(size) for part, size in zip(mixer.scale, (n, n, n * n), strict=True)])
        pre, post, comb = (raw * scale + mixer.base).split([n, n, n * n], dim=1)
        comb = comb.unflatten(1, (n, n)).softmax(2) + mixer.eps
        comb = comb / (comb.sum(1, keepdim=True) + mixer.eps)
        for _ in range(mixer.iterations - 1):
            comb = comb / (comb.sum(2, keepdim=True) + mixer.eps)
            comb = comb / (comb.sum(1, keepdim=True) + mixer.eps)
        read = ((pre.sigmoid() + mixer.eps)[..., None] * streams).sum(1)
        return Residual(Streams(streams, read, 2 * post.sigmoid(), comb), norm)

    def add_over_ranks(self, x: Residual, part: Tensor, following: Norm) -> Residual:
        streams = x.value
        if not isinstance(streams, Streams):
            return super().add_over_ranks(x, part, following)
        assert streams.post is not None and streams.comb is not None, "no block has been entered"
        added = streams.post[..., None] * self.ranks.add_up(part)[:, None]
        return Residual(Streams(added + streams.comb.transpose(1, 2) @ streams.values), following)

    def normalize(self, x: Residual, norm: Norm) -> Tensor:
        value = x.prepared_for(norm)
        if not isinstance(value, Streams):
            return super().normalize(x, norm)
        assert value.read is not None, "no block has been entered"
        return plain.rms_norm(value.read, *norm)

    def merge(self, x: Residual) -> Residual:
        return Residual(x.value.values.mean(1), x.norm)

    def recur(self, step: Step, x: Residual, norm: Norm, layer: Recurrence, state: DeltaState) -> Tensor:
        batch, delta = step.batch, layer.delta
        assert batch.state_slots is not None
        qkv, beta, forget, gate = self.project(x, norm, [layer.in_proj])
        decay = find_decay(plain.linear(forget, layer.f_b), delta).flatten(1)
        inputs = torch.cat([qkv, decay, beta.sigmoid()], dim=1)
        seen = torch.zeros(len(qkv), delta.heads, delta.dim, device=qkv.device)
        ends = batch.query_start.tolist()
        for place, first, last in zip(batch.state_slots.tolist(), ends, ends[1:], strict=False):
            if place and first < last:
                start = int(batch.positions[first])
                seen[first:last] = run_delta(inputs[first:last], delta, state, place, start)
        gate = plain.linear(gate, layer.g_b).unflatten(1, (delta.heads, delta.dim))
        return (plain.rms_norm(seen, *layer.norm) * gate.sigmoid()).flatten(1)
