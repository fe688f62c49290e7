"""The operations of GLM-5.3-Flash on a GPU: all of ops/gpu.py, over residual streams, and those of the family.

| operation | 1 and 2 tokens | more |
|---|---|---|
| enter | streams, prepared | streams |
| merge | streams, prepared | streams |
| recur | recurrent/gates, recurrent/tokens | the same; more tokens than FEW_TOKENS: recurrent/chunks (1) |

(1) See the table in kernels/recurrent/recur.py. Heads of more than 128 dimensions: as in operations.py, which reads
numbers back, so that no graph can hold the step.

Files are below kernels/. A block's output is not added to the streams at once: `enter` and `merge` do that in the
launch that reads them. So every kernel that adds to a residual begins with zeros here, as on one of many ranks. The
specification is operations.py. Next: kernels/streams.py.
"""

from typing import Any, NamedTuple

from torch import Tensor

from saccade.kernels.recurrent.delta import DeltaState
from saccade.kernels.recurrent.recur import run_recurrence
from saccade.kernels.recurrent.tokens import Where, fits_kernels
from saccade.kernels.residual import Input, get_values
from saccade.kernels.streams import Unwritten, merge_streams, read_streams, write_streams
from saccade.kernels.types import Norm, StreamMixer
from saccade.models.glm5_next.interface import Recurrence
from saccade.models.glm5_next.operations import FlashReference
from saccade.ops.gpu import Gpu, multiply_any
from saccade.ops.interface import Residual
from saccade.ops.step import Step


class EnteredStreams(NamedTuple):
    """Streams f32 [T, n, hidden] around a block under way."""

    values: Tensor
    mix: Tensor  # how its output will be added, as in `Unwritten`
    mixer: StreamMixer
    read: Input  # what it takes


class FlashGpu(Gpu):
    reads_ahead = True  # kernels/streams.py, see `Unwritten`

    def enter(self, x: Residual, mixer: StreamMixer, norm: Norm) -> Residual:
        before = x.value if isinstance(x.value, Unwritten) else get_values(x.value)
        values, sums = write_streams(before, mixer)
        read, mix = read_streams(values, sums, mixer, norm)
        return Residual(EnteredStreams(values, mix, mixer, read), norm)

    def merge(self, x: Residual) -> Residual:
        assert isinstance(x.value, Unwritten), "behind the last block"
        return Residual(merge_streams(x.value, x.norm), x.norm)

    def read(self, x: Residual, norm: Norm) -> Input:
        value = super().read(x, norm)
        return value.read if isinstance(value, EnteredStreams) else value

    def find_base(self, x: Residual) -> Any:
        if isinstance(x.value, EnteredStreams):
            return self.find_zeros(get_values(x.value.read))
        return super().find_base(x)

    def add_over_ranks(self, x: Residual, part: Input, following: Norm) -> Residual:
        if not isinstance(x.value, EnteredStreams):
            return super().add_over_ranks(x, part, following)
        total = self.ranks.add_up(get_values(part))
        return Residual(Unwritten(x.value.values, total, x.value.mix, x.value.mixer), following)

    def recur(self, step: Step, x: Residual, norm: Norm, layer: Recurrence, state: DeltaState) -> Tensor:
        batch, delta = step.batch, layer.delta
        assert batch.state_slots is not None
        if not fits_kernels(delta):
            numbers = Residual(get_values(self.read(x, norm)), norm)
            return FlashReference(self.ranks).recur(step, numbers, norm, layer, state)
        where = Where(batch.state_slots, batch.positions, batch.query_start)
        qkv, beta, forget, gate = self.project(x, norm, [layer.in_proj])
        low = layer.f_b, layer.g_b
        return run_recurrence(qkv, beta, forget, gate, *low, delta, layer.norm, state, where, multiply_any)
