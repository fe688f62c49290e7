"""The buffers in which one step after the other finds its place.

Sizes are rounded up to a few buckets and every bucket's tensors stay at the same addresses, so that a step can be
captured in a CUDA graph and replayed over new contents. Knows neither requests nor the model. Next: engine.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from saccade.kernels import PAGE
from saccade.ops.step import Batch

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
    """The bucket of a small step's size: as `round_to_bucket` up to 16, then two sizes an octave (24, 32, 48, …).

    Of these steps there are graphs, which are few then. Rows of padding cost little: all see one position and choose
    the same experts.
    """
    step = 1 << (count - 1).bit_length() - 2 if count > 16 else 1
    return -(-count // step) * step if count > 16 else round_to_bucket(count)


def widen(pages: int, most: int) -> int:
    """The width of a small step's page tables: a power of two from LEAST_WIDTH on, or `most` if that is less.

    Eight widths reach 163,840 tokens, so that a growing decode is captured in a graph 8 times, not 40.
    """
    return min(most, max(LEAST_WIDTH, 1 << max(0, pages - 1).bit_length()))


class Buffers:
    """Device memory for the largest step, and its image on the host. One copy brings a step over."""

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
        size = _lay_out(t, r, p, t, has_states)[-1][1]
        is_cuda = torch.device(device).type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda)
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if is_cuda else None
        self._batches: dict[tuple[int, int, int, int], Batch] = {}

    def fill(self, runs: Sequence[Run]) -> Batch:
        """The step of `runs`, at least one; valid until the next call.

        The copy is not waited for until then. (A step inside a prompt reads nothing back: of the third chunk in a row,
        the image would be written over that of the second, whose copy still stands behind the first one's forward.)
        """
        if self._copied is not None:
            self._copied.synchronize()
        lengths = [len(run.tokens) for run in runs]
        ends = [run.start + length for run, length in zip(runs, lengths, strict=True)]
        total, wanted = sum(lengths), sum(run.logits for run in runs)
        reach = [min(-(-(end + run.ahead) // PAGE), self._widest) for run, end in zip(runs, ends, strict=True)]
        pages = max(reach)
        is_small = total <= self._small
        width = widen(pages, self._widest) if is_small else round_to_bucket(pages)
        size = round_small if is_small else round_to_bucket
        shape = (size(total), size(len(runs)), width, size(wanted))
        spans = _lay_out(*shape, self._has_states)
        host = self._host.numpy()
        tokens, positions, slots, request, table, seq_lens, query_start, logit_rows, *states = (
            host[a:b] for a, b in spans
        )
        for column in (tokens, positions, request, table, seq_lens, logit_rows, *states):
            column.fill(0)
        slots.fill(-1)
        query_start.fill(total)

        table = table.reshape(shape[1], shape[2])
        for row, run, used in zip(table, runs, reach, strict=False):  # rows of padding are left over
            held = run.pages[:used]
            row[: len(held)] = held
        # Everything else in one go: 64 decodes one by one would cost more than the step's launches.
        tokens[:total] = [token for run in runs for token in run.tokens]
        positions[:total] = [i for run, end in zip(runs, ends, strict=True) for i in range(run.start, end)]
        request[:total] = np.repeat(np.arange(len(runs)), lengths)
        slots[:total] = table[request[:total], positions[:total] // PAGE] * PAGE + positions[:total] % PAGE
        seq_lens[: len(runs)] = ends
        query_start[1 : len(runs) + 1] = np.cumsum(lengths)
        query_start[0] = 0
        lasts = zip(query_start[1:].tolist(), runs, strict=False)
        logit_rows[:wanted] = [i for last, run in lasts for i in range(last - run.logits, last)]
        for column in states:
            column[: len(runs)] = [run.slot for run in runs]
        self._device[: spans[-1][1]].copy_(self._host[: spans[-1][1]], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if shape not in self._batches:
            flat = [self._device[a:b] for a, b in spans]
            flat[4] = flat[4].view(shape[1], shape[2])
            self._batches[shape] = Batch(*flat)
        return self._batches[shape]


def _lay_out(t: int, r: int, p: int, rows: int, has_states: bool) -> list[tuple[int, int]]:
    """Where each field of a Batch lies in the flat buffer; borders at multiples of 128 bytes, as kernels like them."""
    spans, start = [], 0
    for size in (t, t, t, t, r * p, r, r + 1, rows, *([r] if has_states else [])):
        spans.append((start, start + size))
        start += -(-size // 16) * 16
    return spans
