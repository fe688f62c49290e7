"""Decode steps as CUDA graphs: 670 launches that the host makes once.

`DecodeGraph` is a whole step of greedy decoding, which ends by preparing the next: replayed again and again it decodes
without the host, which only starts it. `CapturedModel` serves the engine, which lays out each step itself. Addresses
stay: the batch, the cache and the weights are those of the capture. Next: fast.py.
"""

from collections.abc import Callable
from ctypes import CDLL, byref, c_size_t, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.batch import Batch
from saccade.fast import MOST, FastModel
from saccade.kernels import PAGE
from saccade.kernels.edges import advance

if TYPE_CHECKING:
    from saccade.cache import Cache
    from saccade.kernels.reference import Selection

MOST_GRAPHS = 64  # of an engine: 12 sizes of small steps at 5 widths


class DecodeGraph:
    """Greedy decoding of `batch_size` requests, one token each a step."""

    def __init__(self, model: FastModel, cache: "Cache", batch_size: int, pages: int, device: torch.device | str):
        """`pages`: of a request's page table."""
        self.device = torch.device(device)
        rows = torch.arange(batch_size, device=device)
        self._batch = Batch(
            tokens=torch.zeros_like(rows),
            positions=torch.zeros_like(rows),
            slots=torch.full_like(rows, -1),
            request=rows,
            page_table=torch.zeros(batch_size, pages, dtype=torch.int64, device=device),
            seq_lens=torch.zeros_like(rows),
            query_start=torch.arange(batch_size + 1, device=device),
            logit_rows=rows,
        )
        self.tokens = torch.zeros_like(rows)  # those chosen last
        self.logits: Tensor | None = None  # f32 [B, vocab] they were chosen from
        self._model, self._cache = model, cache
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._step()  # compiles; the rows it writes are page 0's
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            self._step()
        self._graph.instantiate()
        self.kernels: int | None = count_nodes(self._graph)

    def _step(self) -> None:
        b = self._batch
        self.logits = self._model.find_logits(b, self._cache)
        advance(self.logits, self.tokens, b.tokens, b.positions, b.slots, b.seq_lens, b.page_table)

    def load(self, tokens: Tensor, positions: Tensor, page_table: Tensor) -> None:
        """What the next step runs: a token and its position of each request [B], and their pages [B, pages]."""
        b = self._batch
        b.tokens.copy_(tokens)
        b.positions.copy_(positions)
        b.page_table.zero_()
        b.page_table[:, : page_table.shape[1]].copy_(page_table)
        page = b.page_table.gather(1, (b.positions // PAGE)[:, None])[:, 0]
        b.slots.copy_(page * PAGE + b.positions % PAGE)
        b.seq_lens.copy_(b.positions + 1)

    def run(self) -> None:
        """One step, not waited for: `tokens` will be the next, and the step after it is prepared."""
        self._graph.replay()


def count_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Launches in a captured graph."""

    count = c_size_t(0)
    runtime = CDLL(
        "libcudart.so.13" if torch.version.cuda and torch.version.cuda.startswith("13") else "libcudart.so.12"
    )
    runtime.cudaGraphGetNodes(c_void_p(graph.raw_cuda_graph()), None, byref(count))
    return count.value


@dataclass
class Recording:
    """A step that can be run again, over new contents of the same tensors."""

    replay: Callable[[], None]
    hidden: Tensor  # what it returns, written anew by each replay


def record(run: Callable[[], Tensor], pool: Any) -> Recording:
    """`run` in a CUDA graph. Graphs that share a `pool` use the same memory for all but what they return, so only one
    may be running. Other threads may use the device meanwhile: a push copies weights."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden = run()
    return Recording(graph.replay, hidden)


@dataclass
class Seen:
    """A step that came: its tensors, and its recording once it has come twice."""

    batch: Batch
    cache: "Cache"
    recording: Recording | None = None


class CapturedModel:
    """A FastModel whose small steps are replayed, for an engine that fills the same few batches again and again.

    What a graph has recorded are addresses: of the batch, the cache, and the weights, which keep theirs when a push
    changes what they hold (push.py).
    """

    def __init__(self, model: FastModel, most: int = MOST_GRAPHS, record: Callable[..., Recording] = record):
        """`most`: graphs that are kept; the one that was not run for longest goes first."""
        self.model, self.config, self.mtp = model, model.config, model.mtp
        self._most, self._record = most, record
        self._steps: dict[int, Seen] = {}  # by the id of the batch, the latest last
        self._pool: Any = None  # torch's handle of the graphs' memory

    def forward(self, batch: Batch, cache: "Cache", capture: "list[Selection] | None" = None) -> Tensor:
        """See FastModel.forward; the result holds until the next step of the same batch.

        The second step in a batch is captured: the first has compiled its kernels. `capture` is of selections, and
        such a step is run as it is.
        """
        if len(batch.tokens) > MOST or capture is not None:
            return self.model.forward(batch, cache, capture)
        step = self._steps.pop(id(batch), None)
        if step is None or step.cache is not cache:
            self._keep(Seen(batch, cache))
            return self.model.forward(batch, cache)
        if step.recording is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            step.recording = self._record(lambda: self.model.forward(batch, cache), self._pool)
        self._keep(step)
        step.recording.replay()
        return step.recording.hidden

    def _keep(self, step: Seen) -> None:
        self._steps[id(step.batch)] = step  # which holds the batch, so that no other gets its id
        if len(self._steps) > self._most:
            del self._steps[next(iter(self._steps))]

    def logits(self, rows: Tensor) -> Tensor:
        return self.model.logits(rows)
