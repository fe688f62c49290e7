"""The buffers in which one step after the other finds its place, with what its rows of logits are wanted for.

Sizes are rounded up to a few buckets and every bucket's tensors stay at the same addresses, so that a step can be
captured in a CUDA graph and replayed over new contents. Knows neither requests nor the model. Next: engine.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saccade.engine.sample import FIELDS
from saccade.kernels import PAGE
from saccade.ops.step import Batch

HostArray = np.ndarray[Any, Any]

LEAST_WIDTH = 32  # pages of a small step's table: 2,048 tokens, all of which DeepSeek's indexer would select


class Run(NamedTuple):
    """Consecutive tokens of one request, as they enter a step."""

    tokens: Sequence[int]
    start: int  # position of the first
    pages: Sequence[int]  # the request's pages from position 0 on, at least up to the last token
    logits: int  # of the last how many tokens logits are wanted
    ahead: int = 0  # positions behind the last whose pages the table names too, as far as the request has them
    slot: int = 0  # the request's place in states


def round_to_bucket(count: int) -> int:
    """The bucket of a size: 1 to 8, then four sizes an octave (10, 12, 14, 16, 20, …): a quarter is padding at most."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def round_small(count: int) -> int:
    """The bucket of a small step's size: as `round_to_bucket`, but from 16 to 256 two sizes an octave (24, 32, 48, …).

    A step's graph holds for one size, so fewer sizes are fewer graphs. Rows of padding cost little up to 256, where
    reading the weights takes the time: all see one position and choose the same experts. Above, a row costs
    what a token does.
    """
    if not 16 < count <= 256:
        return round_to_bucket(count)
    step = 1 << (count - 1).bit_length() - 2
    return -(-count // step) * step


def widen(pages: int, most: int) -> int:
    """The width of a small step's page tables: a power of two from LEAST_WIDTH on, or `most` if that is less.

    Eight widths reach 163,840 tokens, so that a growing decode is captured in a graph 8 times, not 40.
    """
    return min(most, max(LEAST_WIDTH, 1 << max(0, pages - 1).bit_length()))


class StepLayout(NamedTuple):
    """The runs of a step as columns, an item for each run but for `tokens`, in the order of the runs."""

    tokens: Sequence[int]  # of all runs, one after the other
    starts: Sequence[int]  # as Run's, and so the next two
    logits: Sequence[int]
    slots: Sequence[int]
    lengths: Sequence[int]  # tokens of each
    reach: int  # positions that the tables name at most
    tables: Callable[[int], HostArray]  # a width -> the pages of each run, [runs, width]
    wants: Callable[[int], HostArray] | None = None  # rows of logits -> what for, as `list_columns`; None: nobody asks
    rounds: bool = False  # as Batch has it


class StepInputs(NamedTuple):
    """A step on the device."""

    batch: Batch
    wants: Tensor  # f64 [FIELDS, L]  what the rows of logits are for; what an earlier step wanted, where nobody asks


class UnknownTokens(NamedTuple):
    """Tokens of a step that the step before it chooses, and that the host does not know yet."""

    chosen: Tensor  # i64, on the device: the choices of that step
    rows: Sequence[int]  # which of them
    places: Sequence[int]  # where in the new step's tokens


class Image(NamedTuple):
    """A step on the host, and when its copy to the device has ended."""

    numbers: Tensor
    copied: torch.cuda.Event | None


class Buffers:
    """Device memory for the largest step, and two images of it on the host. One copy brings a step over.

    Two, because a step may be laid out while the one before it runs, behind which its copy stands.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_tokens: int,
        max_requests: int,
        max_pages: int,
        small: int = 0,
        has_states: bool = False,
    ) -> None:
        """`max_pages` is of one request. Steps of up to `small` tokens have few sizes (`round_small`) and page tables
        of few widths (`widen`). `has_states`: batches say where each request's states are."""
        t, r = (max(round_to_bucket(n), round_small(min(n, small))) for n in (max_tokens, max_requests))
        p = round_to_bucket(max_pages)
        self._small, self._widest, self._has_states = small, p, has_states
        size = _lay_out(t, r, p, t, has_states)[-1][1] + 2 * t  # behind a step: what follows the step before it
        is_cuda = torch.device(device).type == "cuda"
        self._images = [
            Image(torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda), torch.cuda.Event() if is_cuda else None)
            for _ in range(2)
        ]
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._inputs: dict[tuple[int, int, int, int, bool], StepInputs] = {}

    @property
    def widest(self) -> int:
        """Pages of a table, at most."""
        return self._widest

    def fill(self, runs: Sequence[Run], rounds: bool = False) -> Batch:
        """The step of `runs`, at least one; valid until the next call. `rounds`: as Batch has it."""
        ends = [run.start + len(run.tokens) for run in runs]
        held = [run.pages[: -(-(end + run.ahead) // PAGE)] for run, end in zip(runs, ends, strict=True)]

        def list_pages(width: int) -> HostArray:
            table = np.zeros((len(runs), width), dtype=np.int64)
            for row, pages in zip(table, held, strict=True):
                row[: len(pages)] = pages[:width]
            return table

        return self.lay_out(
            StepLayout(
                [token for run in runs for token in run.tokens],
                [run.start for run in runs],
                [run.logits for run in runs],
                [run.slot for run in runs],
                [len(run.tokens) for run in runs],
                max(end + run.ahead for run, end in zip(runs, ends, strict=True)),
                list_pages,
                rounds=rounds,
            )
        ).batch

    def lay_out(self, step: StepLayout, follow: UnknownTokens | None = None) -> StepInputs:
        """The step on the device; valid until the next call. Its copy is not waited for until the call after that."""
        image = self._images[0]
        self._images.reverse()
        if image.copied is not None:
            image.copied.synchronize()
        runs, total, wanted = len(step.starts), len(step.tokens), sum(step.logits)
        pages = min(-(-step.reach // PAGE), self._widest)
        is_small = total <= self._small
        width = widen(pages, self._widest) if is_small else round_to_bucket(pages)
        size = round_small if is_small else round_to_bucket
        # In a small step each request has a row of logits, wanted or not: without that, steps of as many tokens and
        # requests would have several shapes, by how many prompts end in them.
        rows = max(size(wanted), size(runs)) if is_small and wanted else size(wanted)
        shape = (size(total), size(runs), width, rows)
        spans = _lay_out(*shape, self._has_states)
        host = image.numbers.numpy()
        tokens, positions, slots, request, table, seq_lens, query_start, logit_rows, *states, wants = (
            host[a:b] for a, b in spans
        )
        # All in a few calls of numpy: 64 decodes one by one would cost more than the step's launches.
        starts, lengths, logits = (np.array(x, dtype=np.int64) for x in (step.starts, step.lengths, step.logits))
        ends = np.cumsum(lengths)  # of each run, among the tokens
        table = table.reshape(shape[1], shape[2])
        table[:runs], table[runs:] = step.tables(width), 0
        tokens[:total], tokens[total:] = step.tokens, 0
        request[:total], request[total:] = np.repeat(np.arange(runs), lengths), 0
        positions[:total], positions[total:] = np.arange(total) + np.repeat(starts - ends + lengths, lengths), 0
        at = positions[:total]
        slots[:total], slots[total:] = table[request[:total], at // PAGE] * PAGE + at % PAGE, -1
        seq_lens[:runs], seq_lens[runs:] = starts + lengths, 0
        query_start[0], query_start[1 : runs + 1], query_start[runs + 1 :] = 0, ends, total
        logit_rows[:wanted] = np.arange(wanted) + np.repeat(ends - np.cumsum(logits), logits)
        logit_rows[wanted:] = 0
        for column in states:
            column[:runs], column[runs:] = step.slots, 0
        if step.wants is not None:
            wants.view(np.float64).reshape(FIELDS, rows)[:] = step.wants(rows)
        end, count = spans[-1][1], len(follow.rows) if follow else 0
        if follow is not None:
            host[end : end + count], host[end + count : end + 2 * count] = follow.rows, follow.places
        self._device[: end + 2 * count].copy_(image.numbers[: end + 2 * count], non_blocking=True)
        if image.copied is not None:
            image.copied.record()
        kind = *shape, step.rounds
        if kind not in self._inputs:
            *flat, numbers = (self._device[a:b] for a, b in spans)
            flat[4] = flat[4].view(shape[1], shape[2])
            batch = Batch(*flat, rounds=step.rounds)
            self._inputs[kind] = StepInputs(batch, numbers.view(torch.float64).view(FIELDS, rows))
        inputs = self._inputs[kind]
        if follow is not None:
            chosen, places = self._device[end : end + 2 * count].view(2, count)
            inputs.batch.tokens.index_copy_(0, places, follow.chosen.index_select(0, chosen))
        return inputs


def _lay_out(t: int, r: int, p: int, rows: int, has_states: bool) -> list[tuple[int, int]]:
    """Where each field of a Batch, then the wants, lie in the flat buffer; borders at multiples of 128 bytes, as
    kernels like them."""
    spans, start = [], 0
    for size in (t, t, t, t, r * p, r, r + 1, rows, *([r] if has_states else []), FIELDS * rows):
        spans.append((start, start + size))
        start += -(-size // 16) * 16
    return spans
