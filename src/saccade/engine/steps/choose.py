"""How a step without drafts chooses its tokens: what the host says of it, and what the device does.

Usual requests, greedy or not, with log-probabilities or scores, differ in numbers alone: a step's CUDA graph holds the
choice. Changes of logits are applied behind the graph, because the host finds a grammar's masks while the device
computes the model. Next: sampling/want.py, graphs.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from saccade.engine.model import Runner
from saccade.engine.request import Job
from saccade.engine.sample import (
    GREEDY,
    RANDOM,
    ChoiceKind,
    Draw,
    Packed,
    Row,
    Spec,
    choose_tokens,
    find_kind,
    list_columns,
    round_logprobs,
    sample_rows,
)
from saccade.engine.sampling.change import Changes
from saccade.engine.sampling.want import count_logprobs, want_rows
from saccade.engine.scheduling.requests import Chunk
from saccade.engine.steps.selections import StepSelections
from saccade.engine.steps.slot_table import SlotTable
from saccade.ops.step import Batch, Cache


class StepWants(NamedTuple):
    """How a step chooses its tokens, on the host."""

    kind: ChoiceKind | None  # None: no row of logits is wanted
    columns: "Callable[[int], np.ndarray[Any, Any]] | None" = None  # as StepLayout's `wants`
    rows: Sequence[list[Row]] = ()  # of each chunk, where they were made one by one
    changes_logits: bool = False  # of any row


def want_tokens(chunks: Sequence[Chunk], jobs: Sequence[Job], counts: Sequence[int], table: SlotTable) -> StepWants:
    """For requests that want their next token and nothing else, out of the arrays in `table`. `counts`: rows of logits
    of each chunk."""
    last = [(c.request, job) for c, job, count in zip(chunks, jobs, counts, strict=True) if count]
    if not last:
        return StepWants(None)
    if not any(job.params.temperature for _, job in last):
        return StepWants(GREEDY)
    slots, places = [request.slot for request, _ in last], [len(request.tokens) for request, _ in last]
    return StepWants(RANDOM, partial(table.list_wants, slots, places))


def want_each(chunks: Sequence[Chunk], jobs: Sequence[Job]) -> StepWants:
    """For any requests, row by row."""
    pairs = list(zip(chunks, jobs, strict=True))
    rows = [want_rows(chunk, job) for chunk, job in pairs]
    whole = [row for some in rows for row in some]
    if not whole:
        return StepWants(None, rows=rows)
    kind = find_kind(whole, round_logprobs(max(count_logprobs(chunk, job) for chunk, job in pairs)))
    columns = partial(_list_columns, whole) if kind.reads_columns else None
    changes = any(chunk.is_last and job.params.changes_logits for chunk, job in pairs)
    return StepWants(kind, columns, rows, changes)


def _list_columns(rows: Sequence[Row], length: int) -> "np.ndarray[Any, Any]":
    return list_columns(rows, length).numpy()


def find_draw(ops: Any) -> Draw:
    """How tokens are drawn beside a model that `ops` compute: in Triton where they are kernels, which import it."""
    if getattr(ops, "kernels", "") != "fast":
        return choose_tokens
    from saccade.kernels.draw import draw_tokens

    return draw_tokens


def run_and_choose(
    model: Runner,
    batch: Batch,
    cache: Cache,
    spec: Spec,
    capture: StepSelections | None = None,
    find_changes: Callable[[], Changes | None] = lambda: None,
) -> Packed:
    """A step, and a token for each row whose logits are wanted. `find_changes` is asked while the device computes."""
    hidden = model.forward(batch, cache, capture)
    return sample_rows(model.logits, hidden, batch.logit_rows, spec, find_changes()).pack()
