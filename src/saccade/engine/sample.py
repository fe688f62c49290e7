"""Logits become tokens, on the device and without waiting for it.

The only randomness is one number per row, computed on the host from (seed, position) with integers, so that a seed
gives the same tokens whatever else is in the batch, and a guessed token is verified by simply sampling its position.
Knows rows, not requests. Next: sampling/want.py says what each row wants, sampling/change.py changes logits before.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saccade.engine.sampling.change import Changes
from saccade.engine.sampling.choice import NOT_FINITE, NOTHING_LEFT, Choice

LOGIT_ROWS = 128  # at once: 66 MB of f32 logits with DeepSeek's 129,280 tokens, however many rows are scored


_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
NO_LIMIT = 2**53  # tokens: more than any vocabulary, and integers up to here are exact in f64


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the result."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def find_stream(seed: int) -> int:
    """The stream of random numbers that `seed` names, as 64 bits."""
    return _mix((seed ^ _STEP) & _MASK)


def draw_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: the `position`-th of the stream that `seed` names."""
    return (_mix((find_stream(seed) + position * _STEP) & _MASK) >> 11) * 2.0**-53


def draw_uniforms(streams: "np.ndarray[Any, Any]", positions: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The same for many streams, u64 [n], at a position each, i64 [n] -> f64 [n]. As `_mix`, modulo 2^64."""
    x = streams + positions.astype(np.uint64) * np.uint64(_STEP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Row(NamedTuple):
    """What one row of logits is wanted for."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0  # 0: no limit
    uniform: float = 0.0  # from draw_uniform; unused when greedy
    target: int = -1  # -1: choose a token; else take this one, only its log-probability is of interest


FIELDS = len(Row._fields)
HOW = 4  # of them say how to choose: temperature, top_k, top_p, min_p
_TARGET = FIELDS - 1


class ChoiceKind(NamedTuple):
    """What of a step's rows decides which operations choose their tokens. A CUDA graph holds for one kind."""

    is_random: bool = False  # any row samples
    is_scoring: bool = False  # any row has a target
    logprobs: int = -1  # -1: no log-probability is wanted; 0: the chosen token's; n: the n likeliest as well

    @property
    def reads_columns(self) -> bool:
        """Whether anybody looks at the rows' fields."""
        return self.is_random or self.is_scoring


GREEDY, RANDOM = ChoiceKind(), ChoiceKind(is_random=True)
LOGPROB_SIZES = (-1, 0, 5, 20, 100)  # of ChoiceKind's `logprobs`; beyond these come powers of two


def round_logprobs(asked: int) -> int:
    """The smallest size that is not less than `asked`, as ChoiceKind has it. Each size has CUDA graphs of its own, so
    there are few of them: all that OpenAI's API can ask for is in two. Sorting is the work, whatever the size."""
    fitting = (size for size in LOGPROB_SIZES if size >= asked)
    return next(fitting, 1 << (asked - 1).bit_length())


def choose_tokens(logits: Tensor, columns: Tensor) -> Tensor:
    """One token per row of f32 logits [L, V], by f64 [FIELDS, L] or its first columns -> i64 [L]. What it gives for
    greedy rows means nothing.

    Inverse of the cumulated probabilities, likeliest token first: temperature, then min-p and top-k, then top-p over
    what is left. Equal logits stand in order of token id (the sort is stable), so nothing is left to chance but
    `uniform`. Cumulated in f64: in f32 a tail of 100,000 tokens below 6e-8 each would never be drawn. On a GPU:
    kernels/draw.py.
    """
    temperature, top_k, top_p, min_p, uniform = columns[: HOW + 1, :, None]  # [L, 1] each
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)  # [L, V]
    # The maximum is taken off before the division: 1e30 / 1e-3 would be infinite, 0 / 1e-3 is not.
    # Probabilities, but for a factor: the likeliest token's weight is 1.
    weights = ((ordered - ordered[:, :1]).double() / torch.where(temperature > 0, temperature, 1.0)).exp()
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, NO_LIMIT)
    weights = torch.where((rank < limit) & (weights >= min_p), weights, 0.0)
    total = weights.sum(-1, keepdim=True)
    before = weights.cumsum(-1) - weights  # of the likelier ones
    kept = (before < top_p * total) | (top_p >= 1)
    cumulated = torch.where(kept, weights, 0.0).cumsum(-1)
    threshold = uniform * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, threshold, right=True).clamp(max=logits.shape[1] - 1)
    return tokens.gather(1, place)[:, 0]


Draw = Callable[[Tensor, Tensor], Tensor]  # what `choose_tokens` gives


class Spec(NamedTuple):
    """The wants of all rows, on the device. What the host knows already (the kind) costs no launch."""

    columns: Tensor  # f64 [FIELDS, L], as `list_columns` writes them; anything where the kind reads none
    kind: ChoiceKind
    draw: Draw = choose_tokens  # another way to compute the same

    @classmethod
    def build(cls, rows: Sequence[Row], length: int, logprobs: int, device: torch.device | str) -> "Spec":
        """Columns of `rows`, padded with greedy rows to `length`."""
        return cls(list_columns(rows, length).to(device), find_kind(rows, logprobs))

    def part(self, first: int, end: int) -> "Spec":
        """Of some rows."""
        return self._replace(columns=self.columns[:, first:end])


def find_kind(rows: Sequence[Row], logprobs: int) -> ChoiceKind:
    """`logprobs`: as ChoiceKind has it."""
    is_random = any(row.temperature > 0 and row.target < 0 for row in rows)
    return ChoiceKind(is_random, any(row.target >= 0 for row in rows), logprobs)


def list_columns(rows: Sequence[Row], length: int) -> Tensor:
    """f64 [FIELDS, length] on the host: the fields of each row, padded with greedy ones."""
    # Clamped on the host: an integer of any size has no f64.
    limited = [row if row.top_k < NO_LIMIT else row._replace(top_k=NO_LIMIT) for row in rows]
    padded = [*limited, *[Row()] * (length - len(rows))]
    return torch.tensor(padded, dtype=torch.float64).reshape(length, FIELDS).T.contiguous()


class Sampled(NamedTuple):
    """Tokens, and what was asked about them. Log-probabilities are raw: of temperature 1, before any filter.

    On the device a token is always one of the vocabulary, also where logits are not finite: an embedding is looked up
    by it. Only what is read says NOT_FINITE or NOTHING_LEFT.
    """

    tokens: Tensor  # i64 [L]
    largest: Tensor  # f32 [L]   largest absolute value of the row's logits; NaN or infinite if any of them is; -1:
    #                     they are finite, and all tokens are banned
    logprob: Tensor | None  # f32 [L]   of the token
    top_tokens: Tensor | None  # i64 [L, n] the n likeliest, best first
    top_logprobs: Tensor | None  # f32 [L, n]

    def read(self) -> list[Choice]:
        """One choice per row. The one wait of a step."""
        return self.read_beside(self.tokens.new_empty(0, 1))[0]

    def read_beside(self, beside: Tensor) -> tuple[list[Choice], list[list[int]]]:
        """The same, and the rows of `beside`, i64 [R, n], in the same wait."""
        return self.start_reading(beside).read_choices()

    def start_reading(self, beside: Tensor | None = None) -> "ReadBack":
        """Have all of it copied to the host, which need not wait yet. `beside`: i64 [R, n], copied with it."""
        return ReadBack(self.pack(beside))

    def pack(self, beside: Tensor | None = None) -> "Packed":
        """All of it in one tensor, and the rows of `beside`, i64 [R, n]."""
        tokens = torch.where(self.largest < math.inf, self.tokens, NOT_FINITE)[:, None]  # NaN is less than nothing
        tokens = torch.where(self.largest[:, None] < 0, NOTHING_LEFT, tokens)
        columns, count = [tokens], 0
        if self.logprob is not None:
            columns = [tokens.double(), self.logprob[:, None].double()]  # f64 holds ids exactly
            if self.top_tokens is not None and self.top_logprobs is not None:
                columns += [self.top_tokens.double(), self.top_logprobs.double()]
                count = self.top_tokens.shape[1]
        rows = torch.cat(columns, 1) if len(columns) > 1 else tokens
        flat = rows.flatten() if beside is None else torch.cat([rows.flatten(), beside.flatten()])
        wide = 1 if beside is None else max(1, beside.shape[1])
        return Packed(flat, self.tokens, rows.numel(), rows.shape[1], count, wide)


class Packed(NamedTuple):
    """What a step chose, in one tensor on the device."""

    flat: Tensor  # rows of `width`, `numbers` in all, then rows of `wide`
    tokens: Tensor  # of the rows, where they are: the next step can begin with them
    numbers: int
    width: int
    best: int  # likeliest tokens of each row
    wide: int


class ReadBack:
    """What a step chose, on its way to the host."""

    def __init__(self, packed: Packed) -> None:
        flat, self.tokens, self._numbers, self._width, self._count, self._wide = packed
        self._flat, self._copied = flat, None
        if flat.is_cuda:  # what is launched from now on is not waited for
            self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> list[Any]:
        """The numbers. The one wait of a step."""
        if self._copied is not None:
            self._copied.synchronize()
        flat: list[Any] = self._flat.tolist()
        return flat

    @property
    def is_plain(self) -> bool:
        """Whether it is one token a row, and nothing more."""
        return self._width == 1 and self._numbers == len(self._flat)

    def read_choices(self) -> tuple[list[Choice], list[list[int]]]:
        """One choice a row, and the rows beside."""
        flat, width, count, choices = self.wait(), self._width, self._count, list[Choice]()
        if width == 1:
            choices = [Choice(token, 0.0, ()) for token in map(int, flat[: self._numbers])]
        for i in range(0, self._numbers if width > 1 else 0, width):
            token, logprob, *best = flat[i : i + width]
            top = tuple((int(t), p) for t, p in zip(best[:count], best[count:], strict=True))
            choices.append(Choice(int(token), logprob, top))
        return choices, [
            [int(x) for x in flat[i : i + self._wide]] for i in range(self._numbers, len(flat), self._wide)
        ]


def join_samples(parts: Sequence[Sampled]) -> Sampled:
    """The rows of all parts, which were sampled with the same `logprobs`."""
    if len(parts) == 1:
        return parts[0]
    columns = [[column for column in same if column is not None] for same in zip(*parts, strict=True)]
    tokens, largest, *rest = [torch.cat(column) if column else None for column in columns]
    assert tokens is not None and largest is not None  # they are always there
    return Sampled(tokens, largest, *rest)


def sample(logits: Tensor, spec: Spec, changes: Changes | None = None) -> Sampled:
    """Tokens for f32 logits [L, V], chosen from them after `changes`. Greedy is the lowest id among the maxima. Nothing
    is read back."""
    largest = torch.linalg.vector_norm(logits, math.inf, -1)  # one launch; NaN goes through
    changed = logits if changes is None else changes.apply(logits)
    tokens = changed.argmax(-1)  # torch documents: the first of several maxima
    if changes is not None:
        is_banned = changed.gather(1, tokens[:, None])[:, 0] == -math.inf
        largest = torch.where(is_banned & (largest < math.inf), -1.0, largest)
    columns, kind, draw = spec
    if kind.is_random:
        tokens = torch.where(columns[0] > 0, draw(changed, columns), tokens)
    if kind.is_scoring:
        target = columns[_TARGET].long()
        tokens = torch.where(target >= 0, target, tokens)
    if kind.logprobs < 0:
        return Sampled(tokens, largest, None, None, None)
    norm = logits.logsumexp(-1)  # [L]
    logprob = logits.gather(1, tokens[:, None])[:, 0] - norm
    if kind.logprobs == 0:
        return Sampled(tokens, largest, logprob, None, None)
    best, best_tokens = logits.sort(dim=-1, descending=True, stable=True)
    count = min(kind.logprobs, logits.shape[1])
    return Sampled(tokens, largest, logprob, best_tokens[:, :count], best[:, :count] - norm[:, None])


def sample_rows(
    find_logits: Callable[[Tensor], Tensor], hidden: Tensor, places: Tensor, spec: Spec, changes: Changes | None = None
) -> Sampled:
    """Tokens for the rows `places` of hidden [T, hidden], LOGIT_ROWS of them at a time."""
    parts = []
    for first in range(0, len(places), LOGIT_ROWS):
        end = min(first + LOGIT_ROWS, len(places))
        changed = None if changes is None else changes.part(first, end)
        parts.append(sample(find_logits(hidden[places[first:end]]), spec.part(first, end), changed))
    return join_samples(parts)
