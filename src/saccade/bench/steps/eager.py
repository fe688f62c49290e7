"""Steps of a model without a CUDA graph, and the batches they are made of.

`EagerSteps` has the interface of `DecodeGraph`: it serves the plain model, and devices that have no graphs. Page tables
here are shuffled, as after many requests came and went. Next: rig.py.
"""

from typing import Protocol

import torch
from torch import Tensor

from saccade.engine.pages import keep_states
from saccade.engine.scheduling.step_kinds import EXACT_PROMPT
from saccade.kernels import PAGE
from saccade.ops.step import Batch, Cache


class Forward(Protocol):
    """`Transformer`."""

    def forward(self, batch: Batch, cache: Cache) -> Tensor: ...
    def logits(self, rows: Tensor) -> Tensor: ...


class Steps(Protocol):
    """`DecodeGraph`, or `EagerSteps`."""

    tokens: Tensor  # i64 [B], the last chosen
    kernels: int | None  # launches of a step

    def load(self, tokens: Tensor, positions: Tensor, page_table: Tensor) -> None: ...
    def run(self) -> object: ...


class EagerSteps:
    """Greedy decode steps of B requests, launched one operation after the other."""

    kernels: int | None = None

    def __init__(self, model: Forward, cache: Cache, batch_size: int) -> None:
        self.model, self.cache, self.rows = model, cache, torch.arange(batch_size)
        self.restore_states = keep_states(cache)

    def load(self, tokens: Tensor, positions: Tensor, page_table: Tensor) -> None:
        self.rows = self.rows.to(tokens.device)
        self.tokens, self.positions, self.page_table = tokens.clone(), positions.clone(), page_table
        self.restore_states()

    @torch.inference_mode()
    def run(self) -> None:
        at, table = self.positions, self.page_table
        slots = table[self.rows, at // PAGE] * PAGE + at % PAGE
        start = torch.arange(len(self.rows) + 1, device=at.device)
        places = self.rows + 1 if self.cache.states else None
        batch = Batch(self.tokens, at, slots, self.rows, table, at + 1, start, self.rows, places)
        self.tokens = self.model.logits(self.model.forward(batch, self.cache)).argmax(-1)
        self.positions = at + 1


def run_one(model: Forward, cache: Cache, tokens: Tensor, positions: Tensor, page_table: Tensor) -> None:
    """One decode step of B requests: tokens and positions i64 [B], pages i64 [B, P]."""
    steps = EagerSteps(model, cache, len(tokens))
    steps.load(tokens, positions, page_table)
    steps.run()


def one_request(tokens: Tensor, start: int, page_table: Tensor, place: int = 1, rounds: bool = False) -> Batch:
    """Consecutive tokens [n] of one request from position `start` on, with the last one's logits wanted. `place`: of
    its states. `rounds`: as Batch has it."""
    n, device = len(tokens), tokens.device
    at = torch.arange(start, start + n, device=device)
    used = page_table[:, : -(-(start + n) // PAGE)]
    ends = torch.tensor([0, n, start + n, n - 1], device=device)
    slots = page_table[0, at // PAGE] * PAGE + at % PAGE
    places = torch.full((1,), place, device=device)
    return Batch(tokens, at, slots, torch.zeros_like(at), used, ends[2:3], ends[:2], ends[3:], places, rounds=rounds)


def prefill(model: Forward, cache: Cache, tokens: Tensor, page_table: Tensor, chunk: int, place: int = 1) -> Tensor:
    """Run all tokens [n] of one request in steps of `chunk`; the state after the last token, [1, hidden]."""
    rounds = len(tokens) > EXACT_PROMPT
    for start in range(0, len(tokens), chunk):
        hidden = model.forward(one_request(tokens[start : start + chunk], start, page_table, place, rounds), cache)
    return hidden[-1:]


def random_tokens(vocabulary: int, count: int, device: torch.device, seed: int = 2) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count,), generator=dice).to(device)


def shuffle_pages(batch: int, pages: int, device: torch.device) -> Tensor:
    """i64 [batch, pages]: each page once, page 0 left out, in no order."""
    order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(3)) + 1
    return order.view(batch, pages).to(device)
