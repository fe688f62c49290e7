"""Steps as CUDA graphs: 669 launches of a decode step and more, which the host makes once.

`DecodeGraph` is a whole step of greedy decoding, which ends by preparing the next: replayed again and again it decodes
without the host, which only starts it. `CapturedModel` serves the engine, which lays out each step itself, with or
without prompts in it; `CapturedDrafts` serves an engine that speculates: its graphs hold the choice of tokens and all
drafts as well. Addresses stay: the batch, the cache and the weights are those of the capture. Next: ops/gpu.py,
speculate.py.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from saccade.engine.buffers import StepInputs, round_small
from saccade.engine.model import Model
from saccade.engine.pages import keep_states
from saccade.engine.sample import Packed, Spec
from saccade.engine.speculate import Drafter, StepKind, draft_and_verify
from saccade.engine.steps.choose import run_and_choose
from saccade.engine.steps.recordings import MOST_GRAPHS, Recorder, Recordings, record
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
        self._restore_states = keep_states(cache)
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
        self._restore_states()
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


class CapturedSteps:
    """Steps of an engine that are replayed; those that give selections have recordings of their own."""

    def __init__(self, most: int, record: Recorder, mixed: int) -> None:
        self._recordings = Recordings(most, record)
        self._selections = SelectionPlace(max(2 * MOST_CAPTURED, mixed))  # decodes may take 32 bits a place

    def is_captured(self, batch: Batch, mixed: int, capture: StepSelections | None) -> bool:
        """See `is_captured`. `capture`: what takes the selections, if anybody wants them."""
        return is_captured(batch, mixed, None if capture is None else self._selections)

    def run(
        self,
        batch: Batch,
        held: tuple[object, ...],
        how: Hashable,
        step: Callable[[StepSelections | None], T],
        capture: StepSelections | None,
    ) -> T:
        """What `step` returns, which holds until the next one of the same kind; see Recordings.run."""
        if capture is None:
            return self._recordings.run((batch, *held), how, partial(step, None))
        both = partial(self._selections.run, batch, step)
        result, found = self._recordings.run((batch, *held), (how, "selections"), both)
        capture.adopt(found)
        return result

    def count_recorded(self) -> int:
        """Graphs that are held."""
        return self._recordings.count()


class CapturedModel:
    """A model on ops/gpu.py whose steps are replayed: an engine fills the same batches again and again.

    What a graph has recorded are addresses: of the batch and its wants, the cache, and the weights, which keep theirs
    when a push changes what they hold (push.py).
    """

    def __init__(self, model: Model, most: int = MOST_GRAPHS, record: Recorder = record, mixed: int = MIXED_TOKENS):
        """`mixed`: tokens of a step with prompts in it that is captured, at most. To capture one takes the host as long
        as to launch it, so shapes have to recur: `Buffers` rounds those of steps of up to `small` tokens."""
        self._mixed, self.small = mixed, max(MOST_CAPTURED, mixed)
        self.model, self.config, self.mtp, self.ops = model, model.config, model.mtp, model.ops
        self._steps = CapturedSteps(most, record, mixed)
        # Where all graphs of large steps leave their result: one of its own for each would be 117 MB for 4,096 tokens.
        self._hidden: Tensor | None = None

    def forward(self, batch: Batch, cache: "Cache", capture: StepSelections | None = None) -> Tensor:
        """See Runner.forward; the result, and what `capture` receives, hold until the next step."""
        if not self._steps.is_captured(batch, self._mixed, capture):
            return self.model.forward(batch, cache, capture)
        return self._steps.run(batch, (cache,), "forward", partial(self._keep_hidden, batch, cache), capture)

    def choose(self, batch: Batch, cache: "Cache", spec: Spec, capture: StepSelections | None = None) -> Packed:
        """See Chooser. One launch of the host in place of those of `forward` and another 12 to 30."""
        step = partial(run_and_choose, self.model, batch, cache, spec)
        if not self._steps.is_captured(batch, self._mixed, capture):
            return step(capture)
        return self._steps.run(batch, (cache, spec.columns), spec.kind, step, capture)

    def _keep_hidden(self, batch: Batch, cache: "Cache", capture: StepSelections | None) -> Tensor:
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
        return self._steps.count_recorded()


class CapturedDrafts:
    """Steps that verify drafts and make new ones, each as one graph: for an engine, as EagerDrafts in speculate.py.

    A graph belongs to a batch, a number of drafts, the kind of choice, and the kind of changes to logits (penalties,
    biases, masks), whose numbers are inputs of the graph.
    """

    is_captured = True

    def __init__(
        self, drafter: Drafter, most: int = MOST_GRAPHS, record: Recorder = record, mixed: int = MIXED_TOKENS
    ) -> None:
        """`mixed`: as CapturedModel has it."""
        self.drafter, self._steps, self._mixed = drafter, CapturedSteps(most, record, mixed), mixed
        self._columns: dict[Hashable, Tensor] = {}  # where graphs find a step's numbers: a few kB each, masks more

    def __call__(
        self,
        inputs: StepInputs,
        cache: "Cache",
        flat: Tensor,
        kind: StepKind,
        capture: StepSelections | None,
        seen: Tensor | None = None,
    ) -> Packed:
        batch, device = inputs.batch, inputs.wants.device
        if device.type == "cuda":
            flat = flat.pin_memory()
        # Up to a token and its drafts of each request, a step is one of decodes.
        decodes = round_small(len(batch.page_table) * (kind.drafts + 1))
        if not self._steps.is_captured(batch, max(self._mixed, min(MOST_CAPTURED, decodes)), capture):
            columns = flat.to(device, non_blocking=True)
            return draft_and_verify(self.drafter, inputs, cache, columns, kind, capture, seen)
        shape = (len(batch.tokens), len(batch.page_table), len(batch.logit_rows), kind.drafts, kind.changes)
        columns = self._columns.setdefault(shape, torch.empty_like(flat, device=device))
        columns.copy_(flat, non_blocking=True)

        def step(found: StepSelections | None) -> Packed:
            return draft_and_verify(self.drafter, inputs, cache, columns, kind, found, seen)

        return self._steps.run(batch, (inputs.wants, cache, seen), kind, step, capture)

    def count_recorded(self) -> int:
        """Graphs that it holds."""
        return self._steps.count_recorded()
