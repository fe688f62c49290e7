"""A step that verifies drafts and makes new ones: main model, choice of tokens, then the MTP layer as often as asked.

The rule. A token is chosen by one number that depends on (seed, position) alone (sample.py), so a draft is verified by
choosing its position's token from the main model's logits and comparing. What is accepted is exactly what decoding
without drafts gives for that seed, and so has its distribution: this is rejection sampling with both sides coupled. A
draft is chosen from the drafter's logits by the *same* number: where the two distributions are alike, so are the two
tokens, at any temperature. (With a number of its own, at temperature 1, a perfect drafter would only be right in
sum p^2 of the cases.)

Nothing is read back here and no shape depends on data, so a whole step can be one CUDA graph. Knows columns of numbers,
not requests. Next: engine.py fills them in, graphs.py records, models/dsa/mtp.py is the layer.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.engine.buffers import StepInputs
from saccade.engine.model import Layer, Runner
from saccade.engine.sample import HOW, NO_LIMIT, ChoiceKind, Draw, Packed, Row, Sampled, Spec, sample_rows
from saccade.engine.sampling.change import (
    Change,
    ChangeKind,
    Changes,
    count_numbers,
    fill_changes,
    find_change_kind,
)
from saccade.engine.steps.choose import find_draw
from saccade.engine.steps.selections import StepSelections
from saccade.kernels import PAGE
from saccade.ops.step import Batch, Cache

MOST_DRAFTS = 5


class Drafter(NamedTuple):
    """Who computes a step."""

    model: Runner
    layer: Layer
    shares_selection: bool  # config.json's index_share_for_mtp_iteration
    most_positions: int  # that the model knows


class Ask(NamedTuple):
    """One request's part of a step."""

    rows: Sequence[Row]  # what its rows of logits are for; none inside a prompt
    guesses: Sequence[int]  # its last tokens, as far as they are drafts to be verified
    following: Sequence[int]  # the token after each of its tokens, as far as known; then 0
    uniforms: Sequence[float]  # of the next token's place and all after it that drafts may reach; none if greedy
    changes: Sequence[Change] = ()  # of its rows, where anybody in the step has any


class StepKind(NamedTuple):
    """What of a step decides which operations it has."""

    drafts: int  # new ones; 0: the MTP layer only writes its cache
    choice: ChoiceKind
    changes: ChangeKind | None = None  # of the rows of logits; what is guessed anew does not know them


class Columns(NamedTuple):
    """Beside StepInputs of T tokens, R requests and L rows of logits. All are f64, which holds token ids and indices
    exactly: what is one tensor is one copy. What the host can work out, it does: a launch costs more than a number."""

    following: Tensor  # [T]     the known token after each token
    source: Tensor  # [T]        where the token after each stands: row of the chosen ones, or L + place in `following`
    guesses: Tensor  # [R, K]    a request's guesses among its tokens; -1: none
    rows: Tensor  # [R, K]       the row of logits that each is verified by
    last: Tensor  # [R]          a request's last token that is no guess
    how: Tensor  # [HOW, R]      temperature, top_k, top_p, min_p
    uniforms: Tensor  # [R, 2K + 1]
    changes: Tensor  # as sampling/change.py lays them out; of 0 numbers where there are none


def cut_columns(flat: Tensor, t: int, r: int, drafts: int) -> Columns:
    """The columns in a flat tensor."""
    sizes = [t, t, r * drafts, r * drafts, r, HOW * r, r * (2 * drafts + 1)]
    following, source, guesses, places, last, how, uniforms, changes = flat.split([*sizes, len(flat) - sum(sizes)])
    return Columns(
        following, source, guesses.view(r, drafts), places.view(r, drafts), last, how.view(HOW, r),
        uniforms.view(r, -1), changes,
    )  # fmt: skip


def fill_columns(asks: Sequence[Ask], batch: Batch, drafts: int) -> Tensor:
    """f64, flat, on the host: the columns of a step. `asks` are in the order of the batch's requests."""
    t, r, length = len(batch.tokens), batch.page_table.shape[0], len(batch.logit_rows)
    changes = [change for ask in asks for change in ask.changes]
    kind = find_change_kind(changes)
    size = 2 * t + r * (2 + HOW + 4 * drafts) + count_numbers(kind, length)
    flat = torch.zeros(size, dtype=torch.float64)
    columns = cut_columns(flat, t, r, drafts)
    if kind is not None:
        fill_changes(changes, kind, columns.changes)
    following, source, guesses, rows, last, how, uniforms, _ = (column.numpy() for column in columns)
    source[:] = range(length, length + t)
    guesses.fill(-1)
    token = row = 0
    for i, ask in enumerate(asks):
        end, wanted = token + len(ask.following), len(ask.rows)
        following[token:end] = ask.following
        source[end - wanted : end] = range(row, row + wanted)
        last[i] = end - 1 - len(ask.guesses)
        if ask.guesses and drafts:
            first = row + wanted - 1 - len(ask.guesses)  # behind those of a prompt whose log-probabilities are wanted
            guesses[i, : len(ask.guesses)] = ask.guesses
            rows[i, : len(ask.guesses)] = range(first, first + len(ask.guesses))
        if ask.uniforms:
            temperature, top_k, *more = ask.rows[-1][:HOW]
            how[:, i] = temperature, min(top_k, NO_LIMIT), *more
            uniforms[i, : len(ask.uniforms)] = ask.uniforms
        token, row = end, row + wanted
    return flat


def draft_and_verify(
    drafter: Drafter,
    inputs: StepInputs,
    cache: Cache,
    flat: Tensor,
    kind: StepKind,
    capture: StepSelections | None = None,
    seen: Tensor | None = None,
) -> Packed:
    """Run a step; `flat` as `fill_columns` wrote it, on the device; `seen`: the table of seen tokens, for penalties.
    Its rows are the batch's logit_rows; beside them are the drafts of each request, if any are made.

    The next step writes the cache rows behind refused drafts anew, in all pools, before anything reads them.
    """
    batch = inputs.batch
    t, r, length = len(batch.tokens), batch.page_table.shape[0], len(batch.logit_rows)
    c = cut_columns(flat, t, r, kind.drafts)
    whole = flat[: 2 * t + r * (2 * kind.drafts + 1)].long()  # the columns up to `last`
    following, source, guesses, rows, last = whole.split([t, t, r * kind.drafts, r * kind.drafts, r])
    hidden = drafter.model.forward(batch, cache, capture)
    if length:
        spec = Spec(inputs.wants, kind.choice, find_draw(drafter.model.ops))
        changes = None if kind.changes is None else Changes.take(c.changes, kind.changes, seen)
        sampled = sample_rows(drafter.model.logits, hidden, batch.logit_rows, spec, changes)
        following = torch.cat([sampled.tokens, following])[source]
    else:  # inside prompts: the head is not even touched
        sampled = Sampled(following[:0], hidden.new_empty(0), None, None, None)
    state, selection = drafter.layer.forward(batch, following, hidden, cache)
    if kind.drafts == 0:
        return sampled.pack()
    accepted = (sampled.tokens[rows] == guesses).view(r, -1).long().cumprod(1).sum(1)  # up to the first that is wrong
    row = last + accepted
    begin = Begin(state[row], selection[row], batch.positions[row], accepted)
    return sampled.pack(make_drafts(drafter, batch, cache, c, kind, begin))


class Begin(NamedTuple):
    """Where each request's drafts begin: behind the last of its tokens that is certain."""

    state: Tensor  # f32 [R, hidden], of the MTP layer
    selection: Tensor  # i32 [R, K]
    positions: Tensor  # i64 [R]
    accepted: Tensor  # i64 [R]: guesses that were right


def make_drafts(drafter: Drafter, batch: Batch, cache: Cache, c: Columns, kind: StepKind, begin: Begin) -> Tensor:
    """i64 [R, K]: the layer's first guess from its state, then each next one from the last.

    A request without anything to draft for goes along: what it writes lies behind all that is known of it, or, where it
    owns no page, in page 0; nowhere, where the table has no column for it.
    """
    state, drafts = begin.state, list[Tensor]()
    request = torch.arange(batch.page_table.shape[0], device=state.device)
    starts = torch.arange(len(request) + 1, device=state.device)
    steps = torch.arange(1, kind.drafts, device=state.device)
    furthest = min(drafter.most_positions, batch.page_table.shape[1] * PAGE) - 1
    beyond = begin.positions + steps[:, None]  # [K - 1, R]
    positions = beyond.clamp(max=furthest)
    pages = batch.page_table[request, positions // PAGE]
    slots = (pages * PAGE + positions % PAGE).masked_fill(beyond > furthest, -1)
    draw = find_draw(drafter.model.ops)
    for i in range(kind.drafts):
        if i:
            ahead = Batch(
                tokens=drafts[-1], positions=positions[i - 1], slots=slots[i - 1], request=request,
                page_table=batch.page_table, seq_lens=positions[i - 1] + 1, query_start=starts, logit_rows=request,
                state_slots=batch.state_slots,
            )  # fmt: skip
            given = begin.selection if drafter.shares_selection else None
            state, _ = drafter.layer.forward(ahead, drafts[-1], state, cache, given)
        logits = drafter.layer.logits(state)
        likeliest, place = logits.argmax(-1), begin.accepted + 1 + i
        drafts.append(choose_drafts(draw, logits, c, place, likeliest) if kind.choice.is_random else likeliest)
    return torch.stack(drafts, 1)


def choose_drafts(draw: Draw, logits: Tensor, c: Columns, place: Tensor, likeliest: Tensor) -> Tensor:
    """i64 [R]: as the main model's token at that place, i64 [R] behind the last known one, will be chosen."""
    temperature, top_k, top_p, min_p = c.how
    uniform = c.uniforms.gather(1, place.clamp(max=c.uniforms.shape[1] - 1)[:, None])[:, 0]
    columns = torch.stack([temperature, top_k, top_p, min_p, uniform])
    return torch.where(temperature > 0, draw(logits, columns), likeliest)


class RunStep(Protocol):
    """A way to run such steps."""

    drafter: Drafter
    is_captured: bool  # as CUDA graphs

    def __call__(
        self,
        inputs: StepInputs,
        cache: Cache,
        flat: Tensor,
        kind: StepKind,
        capture: StepSelections | None,
        seen: Tensor | None = None,
    ) -> Packed:
        """See `draft_and_verify`; `flat` is on the host."""
        ...


class EagerDrafts:
    """Steps as they are, one operation after the other; graphs.py has another way."""

    is_captured = False

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def __call__(
        self,
        inputs: StepInputs,
        cache: Cache,
        flat: Tensor,
        kind: StepKind,
        capture: StepSelections | None,
        seen: Tensor | None = None,
    ) -> Packed:
        return draft_and_verify(self.drafter, inputs, cache, flat.to(inputs.wants.device), kind, capture, seen)


def name_kernels(run: RunStep) -> str:
    """What computes its steps, in the words of LLM's `kernels`; both where model and MTP layer differ."""
    names = sorted({run.drafter.model.ops.kernels, run.drafter.layer.ops.kernels})
    return " and ".join(names) + (" without CUDA graphs" if "fast" in names and not run.is_captured else "")
