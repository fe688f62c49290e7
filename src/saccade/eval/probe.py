"""What each arrangement of the indexer selects and answers, teacher-forced on one fp32 model, the yardstick.

Selections are compared on the yardstick's own hidden states, layer by layer, so that one layer's difference does not
colour the next. Log-probabilities are of a whole run in the arrangement. Next: arrangements.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.engine.pages import allocate_cache
from saccade.engine.scheduling.step_kinds import find_border
from saccade.eval.arrangements import ArrangedReference, Arrangement, Projection
from saccade.kernels import PAGE, reference
from saccade.kernels.types import Latents, Selection
from saccade.models.dsa.transformer import Transformer
from saccade.models.registry import fetch_place, find_family
from saccade.ops.interface import Ops, Residual
from saccade.ops.step import Batch, Step

PROBE_CHUNK = 512  # tokens of a step: bounds the attention probabilities that are kept for one layer


@dataclass
class ProbeDifference:
    """An arrangement against the yardstick, over all probed tokens."""

    name: str
    exact: int = 0  # sequences with the right answer
    log_prob_largest: float = 0.0
    log_prob_mean: float = 0.0
    recall: list[float | None] = field(default_factory=list)  # per layer, of the yardstick's selected tokens
    missed_mass: list[float | None] = field(default_factory=list)  # per layer: its attention on those that are missed


class KeepsAttention:
    """Beside operations in plain torch: keeps each layer's attention over its selection, the mean over heads [T, K]."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.attention: list[Tensor] = []

    def attend_latents(
        self, step: Step, q: Tensor, selection: Selection, latent: Latents, scale: float, width: int
    ) -> Tensor:
        slots = reference.find_slots(step.batch.page_table, step.batch.request, selection.long().clamp(min=0))
        means = []
        for some_q, some_slots, some in zip(q.split(64), slots.split(64), selection.split(64), strict=True):
            scores = torch.bmm(some_q.float(), reference.read_latents(latent, some_slots).transpose(1, 2)) * scale
            means.append(scores.masked_fill((some < 0)[:, None], float("-inf")).softmax(-1).mean(1))
        self.attention.append(torch.cat(means))
        seen: Tensor = super().attend_latents(step, q, selection, latent, scale, width)  # type: ignore[misc]
        return seen


class Spy(Ops, Protocol):
    """A family's operations that keep the attention of layers, in the order in which they attend."""

    attention: list[Tensor]


def make_spy(model_type: str, activations: str = "exact", *beside: type) -> Spy:
    """The reference operations of a family; `beside`: classes that come in front of them."""
    family = fetch_place(find_family(model_type).reference)
    spy: Spy = type("Spy", (*beside, KeepsAttention, family), {})(activations=activations)
    return spy


class ArrangedSpy(KeepsAttention, ArrangedReference):
    """The same in an arrangement."""


def chunks_of(tokens: Sequence[int], device: str, prompt: int = 0) -> list[Batch]:
    """The steps of one request that owns pages 1, 2, ... and place 1 of the states, if there are any. Those of its
    prompt of so many tokens round if an engine's would (step_kinds.py)."""
    n = len(tokens)
    border = min(n, find_border(prompt, 0))
    table = torch.arange(1, -(-n // PAGE) + 1, device=device)[None]
    edges = [*range(0, border, PROBE_CHUNK), *range(border, n, PROBE_CHUNK), n]
    steps = []
    for first, end in pairwise(edges):
        place = torch.arange(first, end, device=device)
        zero = torch.zeros_like(place)
        steps.append(
            Batch(
                tokens=torch.tensor(tokens[first:end], device=device),
                positions=place,
                slots=place + PAGE,
                request=zero,
                page_table=table[:, : -(-int(place[-1] + 1) // PAGE)],
                seq_lens=place[-1:] + 1,
                query_start=torch.tensor([0, len(place)], device=device),
                logit_rows=zero,
                state_slots=torch.ones(1, dtype=torch.long, device=device),
                rounds=first < border,
            )
        )
    return steps


@torch.inference_mode()
def probe(
    model: Transformer,
    projections: dict[int, Projection],
    arrangements: Sequence[Arrangement],
    sequences: Sequence[tuple[Sequence[int], int]],
    is_right: Sequence[bool],
    device: str,
) -> list[ProbeDifference]:
    """Compare `arrangements` with the first of them on (tokens, where the answer begins). An arrangement is exact where
    the answer is right and it would write the same, token for token.

    `model` is fp32. Differences of log-probabilities are those of answers' tokens. Only positions
    with more tokens to see than `index_topk` count for recall and missed mass, which are None without such positions.
    """
    results = [ProbeDifference(a.name) for a in arrangements]
    layers = len(model.layers)
    sums = torch.zeros(len(arrangements), 2, layers, dtype=torch.float64)
    counted = tokens_scored = 0
    for (tokens, answer), right in zip(sequences, is_right, strict=True):
        for kept, missed, n in _selections(model, projections, arrangements, tokens, device):
            sums[:, 0] += kept
            sums[:, 1] += missed
            counted += n
        scores = [_log_probs(model, projections, a, tokens, device) for a in arrangements]
        tokens_scored += len(tokens) - answer
        for result, (score, is_best) in zip(results, scores, strict=True):
            result.exact += right and bool(is_best[answer - 1 :].all())
            difference = (score - scores[0][0])[answer - 1 :].abs()
            largest = float(difference.max())  # NaN is kept: max() of Python's would drop it
            result.log_prob_largest = max(result.log_prob_largest, largest) if largest >= 0 else largest
            result.log_prob_mean += float(difference.sum())
    for result, (kept, missed) in zip(results, sums, strict=True):
        for shares, total in ((result.recall, kept), (result.missed_mass, missed)):
            shares += (total / counted).tolist() if counted else [None] * layers
        result.log_prob_mean /= max(tokens_scored, 1)
    return results


def _log_probs(
    model: Transformer, projections: dict[int, Projection], arrangement: Arrangement, tokens: Sequence[int], device: str
) -> tuple[Tensor, Tensor]:
    """[n - 1] log-probabilities of each token given those before it, and whether it is the likeliest; the whole model
    in this arrangement."""
    pages = -(-len(tokens) // PAGE) + 1
    cache = allocate_cache(
        model.config, pages, "float32", device, False, arrangement.index_cache, latent_cache=arrangement.latent_cache
    )
    found, is_best = [], []
    model = model.with_ops(ArrangedReference(model, projections, arrangement))
    for batch in chunks_of(tokens, device):
        first = int(batch.positions[0])
        targets = torch.tensor(tokens[first + 1 : first + 1 + len(batch.tokens)], device=device)
        logits = model.logits(model.forward(batch, cache)[: len(targets)])
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        is_best.append(logits.argmax(1) == targets)
    return torch.cat(found).cpu(), torch.cat(is_best).cpu()


def _selections(
    model: Transformer,
    projections: dict[int, Projection],
    arrangements: Sequence[Arrangement],
    tokens: Sequence[int],
    device: str,
) -> list[tuple[Tensor, Tensor, int]]:
    """Per step: for each arrangement and layer, the summed recall and missed mass, and how many positions count."""
    config, pages = model.config, -(-len(tokens) // PAGE) + 1
    caches = [allocate_cache(config, pages, "float32", device, False, a.index_cache) for a in arrangements]
    cache = allocate_cache(config, pages, "float32", device, False, arrangements[0].index_cache)
    ops = [ArrangedReference(model, projections, a) for a in arrangements]
    spy = ArrangedSpy(model, projections, arrangements[0])
    inputs: dict[int, tuple[Residual, Step]] = {}

    def record(layer: int, x: Residual, given: Selection | None, step: Step) -> tuple[Residual, Selection | None]:
        if layer in projections:
            inputs[layer] = x, step
        return x, given

    found = []
    for batch in chunks_of(tokens, device):
        spy.attention.clear()
        selections: list[Selection] = []
        model.with_ops(spy).forward(batch, cache, selections, record)
        counts = (batch.positions + 1 > config.index_topk).cpu()
        kept = torch.zeros(len(arrangements), len(model.layers), dtype=torch.float64)
        missed = torch.zeros_like(kept)
        theirs = {
            (i, source): _select(model, ops[i], source, x, step._replace(cache=caches[i]))
            for source, (x, step) in inputs.items()
            for i in range(len(arrangements))
        }
        for layer, (selection, mass) in enumerate(zip(selections, spy.attention, strict=True)):
            source = max(i for i in projections if i <= layer)
            for i in range(len(arrangements)):
                has = _is_in(selection, theirs[i, source])
                size = (selection >= 0).sum(1)
                share = (has.sum(1) / size).cpu()
                lost = (mass * (~has & (selection >= 0))).sum(1).cpu()
                kept[i, layer] = share[counts].double().sum()
                missed[i, layer] = lost[counts].double().sum()
        found.append((kept, missed, int(counts.sum())))
    return found


def _select(model: Transformer, ops: Ops, layer: int, x: Residual, step: Step) -> Selection:
    """What a layer selects; its rows go into the step's cache."""
    block = model.layers[layer]
    return block.attention.find_selection(ops, x, block.input_norm, step, None)[1]


def _is_in(selection: Selection, theirs: Selection) -> Tensor:
    """Which of `selection` [T, K] are among `theirs` [T, K']; both ascending, -1 padded."""
    big = torch.iinfo(torch.int32).max
    ordered = torch.where(theirs < 0, big, theirs).sort(1).values
    place = torch.searchsorted(ordered, selection.contiguous()).clamp(max=theirs.shape[1] - 1)
    return (ordered.gather(1, place) == selection) & (selection >= 0)
