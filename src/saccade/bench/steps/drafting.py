"""What several tokens a step cost: the time of a step that verifies K drafts and makes K new ones, against a plain one.

Such a step is measured as the engine runs it, choice of tokens included, at one place of the text again and again: with
synthetic weights no draft is right, and how often real ones are is another measurement (eval/drafts.py, `generate
--speculate`). What is told instead is the acceptance from which K drafts pay. Next: engine/speculate.py, decode.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.bench.bytes import HELD, Storage, count_bytes, count_layer, count_mtp_ends
from saccade.bench.record import Record
from saccade.bench.steps.eager import random_tokens
from saccade.engine.buffers import Buffers, Run, StepInputs
from saccade.engine.graphs import MOST_CAPTURED, capture
from saccade.engine.pages import keep_states
from saccade.engine.sample import GREEDY, Row, list_columns
from saccade.engine.speculate import MOST_DRAFTS, Ask, Drafter, StepKind, draft_and_verify, fill_columns
from saccade.errors import RequestError
from saccade.kernels import PAGE
from saccade.models.dsa.config import ModelConfig
from saccade.ops.step import Cache


class DraftSteps:
    """The interface of `DecodeGraph`, for steps of `drafts` drafts that all begin at the same place."""

    def __init__(
        self, drafter: Drafter, cache: Cache, table: Tensor, context: int, drafts: int, vocabulary: int,
        start: int | None = None,
    ) -> None:  # fmt: skip
        """`table` [B, P]: each request's pages, for `context` tokens. `start`: a step's first position, where states
        are now; None: where the last draft is made at the end of the context."""
        device, requests = table.device, len(table)
        start = context - 2 * drafts if start is None else start
        self._restore_states = keep_states(cache)
        tokens = random_tokens(vocabulary, requests * (drafts + 1), device).view(requests, -1).tolist()
        buffers = Buffers(
            device, requests * (drafts + 1), requests, -(-context // PAGE), MOST_CAPTURED, bool(cache.states)
        )
        own = enumerate(zip(tokens, table.tolist(), strict=True), 1)
        runs = [Run(t, start, pages, drafts + 1, drafts, slot) for slot, (t, pages) in own]
        batch = buffers.fill(runs)
        asks = [Ask([Row()] * (drafts + 1), t[1:], [*t[1:], 0], ()) for t in tokens]
        flat = fill_columns(asks, batch, drafts).to(device)
        inputs = StepInputs(batch, list_columns([], len(batch.logit_rows)).to(device))

        @torch.inference_mode()
        def step() -> Tensor:
            return draft_and_verify(drafter, inputs, cache, flat, StepKind(drafts, GREEDY)).flat

        self._held = buffers, inputs, flat  # what a graph has recorded are addresses
        self.tokens: Tensor = step()
        self.kernels: int | None = None
        self.run: Callable[[], object] = step
        if device.type == "cuda":
            self.run, self.tokens, self.kernels = capture(step, device)

    def load(self, tokens: Tensor, positions: Tensor, page_table: Tensor) -> None:
        """States as they were: other steps change them. A step refuses all drafts, so it leaves what it reads."""
        self._restore_states()


def require_drafts(drafts: Sequence[int], context: int) -> None:
    for count in drafts:
        if not 1 <= count <= MOST_DRAFTS or 2 * count >= context:
            raise RequestError(
                f"speculate: expected 1 to {MOST_DRAFTS} drafts, less than half of the context, found {count}"
            )


def find_break_even(ratio: float, drafts: int) -> float | None:
    """The probability with which a draft must be right, if those before it are, for a step of `drafts` drafts that
    takes `ratio` times a plain one to give as many tokens a second: 1 + p + ... + p^K = ratio. None if none is enough.
    """
    if ratio > drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        if sum(p**i for i in range(drafts + 1)) < ratio:
            low = p
        else:
            high = p
    return high


def count_draft_bytes(c: ModelConfig, batch: int, context: int, drafts: int, storage: Storage = HELD) -> float:
    """The fewest bytes of such a step, tokens choosing experts at random: the main model over batch * (K + 1) tokens,
    the MTP layer over as many, then K - 1 times over one of each request."""
    together = batch * (drafts + 1)
    total = sum(count_bytes(c, together, context, storage=storage, requests=batch).values())
    for tokens in (together, *[batch] * (drafts - 1)):
        total += sum(count_layer(c, c.num_hidden_layers, tokens, context, storage=storage, requests=batch).values())
        total += count_mtp_ends(c, storage)
    return total


def describe_drafts(
    c: ModelConfig, plain: Record, drafts: int, samples: Sequence[float], milliseconds: float
) -> Record:
    """What the record of a plain step says of steps with drafts, beside it."""
    ratio = milliseconds / plain["tpot_ms"]
    return {
        "drafts": drafts,
        "step_ms": milliseconds,
        "samples_ms": list(samples),
        "ratio": ratio,
        "pays_from": find_break_even(ratio, drafts),
        "bytes_per_step": count_draft_bytes(c, plain["batch"], plain["context"], drafts),
    }


def show_drafts(record: Record) -> list[str]:
    """Lines for people."""
    lines = []
    for d in record.get("speculate", ()):
        from_ = "never pays" if d["pays_from"] is None else f"pays from {d['pays_from']:.0%} of drafts accepted"
        launches = f", {d['kernels']} launches" if d["kernels"] else ""
        lines.append(
            f"batch {record['batch']}, context {record['context']}, {d['drafts']} drafts: {d['step_ms']:.3f} ms a step,"
            f" {d['ratio']:.2f} times a plain one; {from_}; {d['bytes_per_step'] / 1e9:.2f} GB{launches}"
        )
    return lines
