"""Steps as CUDA graphs: 669 launches of a decode step and more, which the host makes once.

`DecodeGraph` is a whole step of greedy decoding, which ends by preparing the next: replayed again and again it decodes
without the host, which only starts it. `CapturedModel` serves the engine, which lays out each step itself, with or
without prompts in it; `CapturedDrafts` serves an engine that speculates: its graphs hold the choice of tokens and all
drafts as well. Addresses stay: the batch, the cache and the weights are those of the capture. Next: ops/gpu.py,
speculate.py.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from saccade.engine.buffers import round_small
from saccade.engine.model import Model
from saccade.engine.sample import Packed, make_greedy, sample_rows
from saccade.engine.speculate import Drafter, Outcome, StepKind, draft_and_verify
from saccade.engine.steps.selections import SelectionPlace, StepSelections
from saccade.kernels import PAGE
from saccade.kernels.cudart import count_nodes
from saccade.kernels.embed import advance
from saccade.kernels.types import CAPTURED_TOKENS, MIXED_SCORES, MIXED_TOKENS
from saccade.ops.step import Batch

if TYPE_CHECKING:
    from saccade.ops.step import Cache

T = TypeVar("T")

MOST_CAPTURED = CAPTURED_TOKENS  # tokens of a captured step of one token a request, or of its drafts
MOST_GRAPHS = 100  # of an engine: as many as 20 sizes of decode steps at 5 widths of page tables


class DecodeGraph:
    """Greedy decoding of `batch_size` requests, one token each a step."""

    def __init__(self, model: Model, cache: "Cache", batch_size: int, pages: int, device: torch.device | str):
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
            state_slots=rows + 1 if cache.states else None,
        )
        self._states = [{name: t.clone() for name, t in layer.items()} for layer in cache.states]  # to begin again with
        self.tokens = torch.zeros_like(rows)  # those chosen last
        self.logits: Tensor | None = None  # f32 [B, vocab] they were chosen from
        self._model, self._cache = model, cache
        # The rows that the first step writes are page 0's.
        self._replay, _, self.kernels = capture(self._step, self.device)

    def _step(self) -> None:
        b = self._batch
        self.logits = self._model.find_logits(b, self._cache)
        advance(self.logits, self.tokens, b.tokens, b.positions, b.slots, b.seq_lens, b.page_table)

    def load(self, tokens: Tensor, positions: Tensor, page_table: Tensor) -> None:
        """What the next step runs: a token and its position of each request [B], and their pages [B, pages]. States
        are again what they were in the beginning."""
        b = self._batch
        for layer, kept in zip(self._cache.states, self._states, strict=True):
            for name, state in layer.items():
                state.copy_(kept[name])
        b.tokens.copy_(tokens)
        b.positions.copy_(positions)
        b.page_table.zero_()
        b.page_table[:, : page_table.shape[1]].copy_(page_table)
        page = b.page_table.gather(1, (b.positions // PAGE)[:, None])[:, 0]
        b.slots.copy_(page * PAGE + b.positions % PAGE)
        b.seq_lens.copy_(b.positions + 1)

    def run(self) -> None:
        """One step, not waited for: `tokens` will be the next, and the step after it is prepared."""
        self._replay()


def capture(step: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T, int | None]:
    """`step` once, which compiles its kernels, then in a graph: how to replay it, what it returns, and its launches."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads may ask the device meanwhile
        result = step()
    graph.instantiate()
    return graph.replay, result, count_nodes(graph)


@dataclass
class Recording(Generic[T]):
    """A step that can be run again, over new contents of the same tensors."""

    replay: Callable[[], None]
    result: T  # what it returns, written anew by each replay


def record(run: Callable[[], T], pool: Any) -> Recording[T]:
    """`run` in a CUDA graph. Graphs that share a `pool` use the same memory for all but what they return, so only one
    may be running. Other threads may use the device meanwhile: a push copies weights."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return Recording(graph.replay, result)


Recorder = Callable[[Callable[[], Any], Any], Recording[Any]]


class Recordings:
    """Steps that came before, each recorded when it comes for the second time: the first has compiled its kernels."""

    def __init__(self, most: int = MOST_GRAPHS, record: Recorder = record):
        """`most`: that are kept; the one that was not run for longest goes first."""
        self._most, self._record = most, record
        self._pool: Any = None  # torch's handle of the graphs' memory
        # The objects a step works on, by their ids: held, so that no others get those. The latest step is the last.
        self._steps: dict[tuple[Hashable, ...], tuple[tuple[object, ...], Recording[Any] | None]] = {}
        self._too_large: set[tuple[Hashable, ...]] = set()  # for the memory that is left

    def count(self) -> int:
        """Steps that are recorded."""
        return sum(found is not None for _, found in self._steps.values())

    def run(self, held: tuple[object, ...], how: Hashable, step: Callable[[], T]) -> T:
        """What `step` returns, which holds until the next one of the same kind. It works on the objects `held`, whose
        tensors keep their addresses, in the way `how`."""
        key = (*map(id, held), how)
        known = self._steps.pop(key, None)
        found: Recording[Any] | None = None
        if known is not None:
            found = known[1] or self._try(key, step)
        self._steps[key] = held, found
        if len(self._steps) > self._most:
            oldest = next(iter(self._steps))
            del self._steps[oldest]
            self._too_large.discard(oldest)
        if found is None:
            return step()
        found.replay()
        result: T = found.result
        return result

    def _try(self, key: tuple[Hashable, ...], step: Callable[[], T]) -> Recording[T] | None:
        """The step, recorded; None if its memory is not there beside what steps that are not recorded have taken."""
        if key in self._too_large:
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return self._record(step, self._pool)
        except torch.cuda.OutOfMemoryError:
            self._too_large.add(key)
            return None


def is_captured(batch: Batch, mixed: int, place: SelectionPlace | None) -> bool:
    """Whether a step is worth a graph's memory: one token a request, or with prompts up to `mixed` tokens in all. Above
    MOST_CAPTURED tokens the index scores, a number for each token and each position of the table, have a limit too; and
    so have selections, if it gives them, in their `place`."""
    tokens, (requests, pages) = len(batch.tokens), batch.page_table.shape
    if place is not None and not place.has_room(batch):
        return False
    if tokens <= MOST_CAPTURED:
        return tokens == requests or tokens <= mixed
    return tokens <= mixed and tokens * pages * PAGE <= MIXED_SCORES


class CapturedModel:
    """A model on ops/gpu.py whose steps are replayed: an engine fills the same batches again and again.

    What a graph has recorded are addresses: of the batch, the cache, and the weights, which keep theirs when a push
    changes what they hold (push.py).
    """

    def __init__(self, model: Model, most: int = MOST_GRAPHS, record: Recorder = record, mixed: int = MIXED_TOKENS):
        """`mixed`: tokens of a step with prompts in it that is captured, at most. To capture one takes the host as long
        as to launch it, so shapes have to recur: `Buffers` rounds those of steps of up to `small` tokens."""
        self._mixed, self.small = mixed, max(MOST_CAPTURED, mixed)
        self.model, self.config, self.mtp, self.ops = model, model.config, model.mtp, model.ops
        self._recordings = Recordings(most, record)
        # Where all graphs of large steps leave their result: one of its own for each would be 117 MB for 4,096 tokens.
        self._hidden: Tensor | None = None
        self._selections = SelectionPlace(max(2 * MOST_CAPTURED, mixed))  # decodes may take 32 bits a place

    def forward(self, batch: Batch, cache: "Cache", capture: StepSelections | None = None) -> Tensor:
        """See Runner.forward; the result, and what `capture` receives, hold until the next step."""
        return self._replay("forward", self.model.forward, self._keep_hidden, batch, cache, capture)

    def choose_likeliest(self, batch: Batch, cache: "Cache", capture: StepSelections | None = None) -> Packed:
        """See Chooser. One launch of the host in place of those of `forward` and another 12."""
        return self._replay("likeliest", self._choose, self._choose, batch, cache, capture)

    def _choose(self, batch: Batch, cache: "Cache", capture: StepSelections | None = None) -> Packed:
        hidden, rows = self.model.forward(batch, cache, capture), batch.logit_rows
        return sample_rows(self.model.logits, hidden, rows, make_greedy(len(rows))).pack()

    def _replay(
        self, how: str, run: Callable[..., T], recorded: Callable[..., T], batch: Batch, cache: "Cache",
        capture: StepSelections | None,
    ) -> T:  # fmt: skip
        """What `run` returns, or `recorded` where the step is captured."""
        if not is_captured(batch, self._mixed, None if capture is None else self._selections):
            return run(batch, cache, capture)
        step = partial(recorded, batch, cache)
        if capture is None:
            return self._recordings.run((batch, cache), how, step)
        both = partial(self._selections.run, batch, step)
        result, found = self._recordings.run((batch, cache), f"{how}, selections", both)
        capture.adopt(found)
        return result

    def _keep_hidden(self, batch: Batch, cache: "Cache", capture: StepSelections | None = None) -> Tensor:
        hidden = self.model.forward(batch, cache, capture)
        if len(hidden) <= MOST_CAPTURED:
            return hidden
        if self._hidden is None:  # before anything is recorded: a step's first run is not
            self._hidden = hidden.new_empty(self._mixed, *hidden.shape[1:])
        return self._hidden[: len(hidden)].copy_(hidden)

    def logits(self, rows: Tensor) -> Tensor:
        return self.model.logits(rows)

    def count_recorded(self) -> int:
        """Graphs that it holds."""
        return self._recordings.count()


class CapturedDrafts:
    """Steps that verify drafts and make new ones, each as one graph: for an engine, as EagerDrafts in speculate.py.

    A graph belongs to a batch, a number of drafts, whether anybody samples, and the kind of changes to logits
    (penalties, biases, masks), whose numbers are inputs of the graph. Steps that give selections have graphs of their
    own. Steps with scores or log-probabilities are run as they are.
    """

    is_captured = True

    def __init__(
        self, drafter: Drafter, most: int = MOST_GRAPHS, record: Recorder = record, mixed: int = MIXED_TOKENS
    ) -> None:
        """`mixed`: as CapturedModel has it."""
        self.drafter, self._recordings, self._mixed = drafter, Recordings(most, record), mixed
        self._selections = SelectionPlace(max(2 * MOST_CAPTURED, mixed))
        self._columns: dict[Hashable, Tensor] = {}  # where graphs find a step's numbers: a few kB each, masks more

    def __call__(
        self,
        batch: Batch,
        cache: "Cache",
        flat: Tensor,
        kind: StepKind,
        capture: StepSelections | None,
        seen: Tensor | None = None,
    ) -> Outcome:
        device = batch.tokens.device
        if device.type == "cuda":
            flat = flat.pin_memory()
        if kind.is_scoring or kind.logprobs >= 0 or not self._is_captured(batch, kind, capture):
            columns = flat.to(device, non_blocking=True)
            return draft_and_verify(self.drafter, batch, cache, columns, kind, capture, seen)
        shape = (len(batch.tokens), len(batch.page_table), len(batch.logit_rows), kind.drafts, kind.changes)
        columns = self._columns.setdefault(shape, torch.empty_like(flat, device=device))
        columns.copy_(flat, non_blocking=True)
        step = partial(draft_and_verify, self.drafter, batch, cache, columns, kind, seen=seen)
        if capture is None:
            return self._recordings.run((batch, cache, seen), kind, step)
        both = partial(self._selections.run, batch, lambda found: step(capture=found))
        outcome, found = self._recordings.run((batch, cache, seen), (kind, "selections"), both)
        capture.adopt(found)
        return outcome

    def _is_captured(self, batch: Batch, kind: StepKind, capture: StepSelections | None) -> bool:
        """Up to a token and its drafts of each request, a step is one of decodes."""
        decodes = round_small(len(batch.page_table) * (kind.drafts + 1))
        mixed = max(self._mixed, min(MOST_CAPTURED, decodes))
        return is_captured(batch, mixed, None if capture is None else self._selections)
