"""Steps as CUDA graphs: a step of this model is some three thousand kernels that take less time than launching them.

The first step of a kind runs as it is, the second is recorded, from then on it is replayed. On the CPU every step just
runs. Knows nothing of models: a step is a function of tensors that works in place.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind", bound=Hashable)
Result = list[dict[str, Tensor]]


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Result


class Replay(Generic[Kind]):
    """`replay(kind, inputs)` is `step(kind, inputs)` with the inputs (on the CPU) moved to the device. The result is
    overwritten by the next call with the same kind."""

    def __init__(self, device: str, step: Callable[[Kind, Sequence[Tensor]], Result]):
        self.device, self.step = device, step
        self.seen: set[Kind] = set()
        self.recordings: dict[Kind, Recording] = {}
        self.pool = torch.cuda.graph_pool_handle() if device == "cuda" else None

    def __call__(self, kind: Kind, inputs: Sequence[Tensor]) -> Result:
        if self.device != "cuda" or kind not in self.seen:
            self.seen.add(kind)
            return self.step(kind, [t.to(self.device) for t in inputs])
        if kind not in self.recordings:
            self.recordings[kind] = self.record(kind, [t.to(self.device) for t in inputs])
        recording = self.recordings[kind]
        for static, t in zip(recording.inputs, inputs, strict=True):
            static.copy_(t)
        recording.graph.replay()
        return recording.result

    def record(self, kind: Kind, inputs: list[Tensor]) -> Recording:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.step(kind, inputs)
        return Recording(graph, inputs, result)
