"""The two models side by side on the same steps: the fast path on its own, on the reference's inputs and selections.

Next: compare.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from saccade import fast as few_tokens
from saccade import fast_many as many_tokens
from saccade.batch import Batch, Run
from saccade.cache import Cache
from saccade.engine import on
from saccade.eval.looked import spying
from saccade.eval.probe import Spy
from saccade.fast import FastModel, Residual
from saccade.fast_step import Step as FastStep
from saccade.fast_step import take_norm
from saccade.kernels import PAGE
from saccade.kernels.embed import begin_step
from saccade.kernels.moe.router import Chosen, Routing, choose
from saccade.kernels.reference import Selection
from saccade.kernels.residual import Norm
from saccade.llm import LLM
from saccade.model.decoder import DecoderLayer
from saccade.model.moe import MixtureOfExperts
from saccade.model.transformer import Transformer
from saccade.sample import LOGIT_ROWS

TAIL = 5  # the last tokens of a prompt are a step of their own: few tokens of one request


class Follower(FastModel):
    """The fast kernels, layer by layer on another model's inputs, or with another model's selections."""

    def __init__(self, llm: LLM, cache: Cache) -> None:
        super().__init__(llm.model)
        self._is_covered = self._is_covered and llm.settings.kernels == "fast"
        self.cache = cache
        self.inputs: list[Tensor] | None = None  # of each layer [T, hidden]
        self.given: list[Selection] | None = None  # to each layer

    def follow(self, batch: Batch, inputs: list[Tensor] | None, given: list[Selection] | None) -> list[Selection]:
        """Selections of a step, whose last hidden state is `hidden`."""
        self.inputs, self.given = inputs, given
        seen: list[Selection] = []
        if self._is_covered:
            self.hidden = self.forward(batch, self.cache, seen)
            return seen
        x, rotation = self.model.embed_tokens[batch.tokens].float(), self.model.rotary(batch.positions)
        for i, layer in enumerate(self.layers):
            shared = None if self.config.has_indexer(i) else seen[-1]
            x = inputs[i] if inputs else x
            x, selection = layer(x, rotation, batch, self.cache, given[i] if given else shared)
            seen.append(selection)
        self.hidden = self.model.norm(x)
        return seen

    def run_layer(
        self, layer: DecoderLayer, x: Residual, step: FastStep, given: Selection | None, following: Norm
    ) -> tuple[Residual, Selection]:
        i, batch = layer.attention.layer, step.batch
        if self.inputs is not None:  # as if they were the rows of an embedding
            rows, norm = torch.arange(len(batch.tokens), device=batch.tokens.device), take_norm(layer.input_norm)
            x, _ = begin_step(rows, batch.positions, self.inputs[i], self.turns, norm)
        return super().run_layer(layer, x, step, self.given[i] if self.given else given, following)


class Recorder:
    """A layer that keeps its input."""

    def __init__(self, layer: DecoderLayer, inputs: list[Tensor]) -> None:
        self.layer, self.attention, self.inputs = layer, layer.attention, inputs

    def __call__(self, x: Tensor, *rest: Any) -> tuple[Tensor, Selection]:
        self.inputs.append(x)
        return self.layer(x, *rest)


@contextmanager
def watching(model: Transformer) -> Iterator[tuple[Spy, list[Tensor]]]:
    """The model's attention and the inputs of its layers, kept while the context is open."""
    inputs: list[Tensor] = []
    with spying(model) as spy:
        layers, model.layers = model.layers, [Recorder(layer, inputs) for layer in model.layers]  # type: ignore[misc]
        try:
            yield spy, inputs
        finally:
            model.layers = layers


class Choices:
    """The experts [T, topk] that tokens choose, layer by layer; or are given instead."""

    def __init__(self) -> None:
        self._noted: list[Tensor] = []
        self._given: Iterator[Tensor] | None = None

    def begin(self, given: Sequence[Tensor] | None = None) -> list[Tensor]:
        """A pass, and where its choices will be. Experts that are given are used instead, with the weights that its own
        logits make."""
        self._noted, self._given = [], None if given is None else iter(given)
        return self._noted

    def note(self, experts: Tensor, weights: Tensor, logits: Tensor, scaling: float) -> Chosen:
        self._noted.append(experts)
        if self._given is None:
            return experts, weights
        given = next(self._given)
        scores = logits.sigmoid().gather(1, given.long())
        return given.to(experts.dtype), scores / (scores.sum(1, keepdim=True) + 1e-20) * scaling


class Router:
    """A model's operations, `route` among them that of `choices`."""

    def __init__(self, ops: Any, choices: Choices) -> None:
        self._ops, self._choices = ops, choices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, x: Tensor, gate: Tensor, *rest: Any) -> Chosen:
        chosen, logits = self._ops.route(x, gate, *rest), self._ops.linear(x, gate, torch.float32)
        return self._choices.note(*chosen, logits, rest[-1])


@contextmanager
def routed(*models: Transformer) -> Iterator[Choices]:
    """All choices of experts, by operations or by kernels, go through the Choices while the context is open."""
    choices = Choices()

    def choose_and_note(logits: Tensor, routing: Routing) -> Chosen:
        return choices.note(*choose(logits, routing), logits, routing.scaling)

    mixtures = {id(layer.mlp): layer.mlp for model in models for layer in model.layers}
    before = [(m, m.ops) for m in mixtures.values() if isinstance(m, MixtureOfExperts)]
    for mixture, ops in before:
        mixture.ops = Router(ops, choices)  # type: ignore[assignment]
    try:
        with patch.object(few_tokens, "choose", choose_and_note), patch.object(many_tokens, "choose", choose_and_note):
            yield choices
    finally:
        for mixture, ops in before:
            mixture.ops = ops


def order(experts: Sequence[Tensor]) -> Tensor:
    """i64 [layers, T, topk], in the order of their ids."""
    return torch.stack([chosen.long().sort(1).values for chosen in experts])


Step = list[tuple[int, int, int]]  # (text, first token, last) side by side


def plan_steps(texts: Sequence[Sequence[int]], starts: Sequence[int], chunk: int) -> Iterator[Step]:
    """Each text up to its start in prefill chunks, then a token of each a step, to the end of the shortest."""
    for i, start in enumerate(starts):
        edges = [*range(0, max(start - TAIL, 0), chunk), max(start - TAIL, 0), start]
        yield from ([(i, a, b)] for a, b in pairwise(edges) if a < b)
    for ahead in range(min(len(text) - start for text, start in zip(texts, starts, strict=True))):
        yield [(i, start + ahead, start + ahead + 1) for i, start in enumerate(starts)]


class Collector:
    """Rows [..., T, n] of steps, brought to their texts."""

    def __init__(self, texts: int) -> None:
        self._parts: list[list[Tensor]] = [[] for _ in range(texts)]

    def add(self, step: Step, rows: Tensor) -> None:
        row = 0
        for i, a, b in step:
            self._parts[i].append(rows[..., row : row + b - a, :].clone())
            row += b - a

    def join(self) -> list[Tensor]:
        return [torch.cat(parts, -2) for parts in self._parts]


def allocate(llm: LLM, texts: Sequence[Sequence[int]]) -> Cache:
    """For the pages of `lay_out`."""
    s, pages = llm.settings, 1 + len(texts) * -(-max(map(len, texts)) // PAGE)
    return Cache.allocate(llm.config, pages, s.dtype, s.device, s.mtp, s.index_cache)


def lay_out(llm: LLM, texts: Sequence[Sequence[int]], step: Step) -> Batch:
    """Waits for the step before, whose image on the host is overwritten."""
    if llm.settings.device.startswith("cuda"):
        torch.cuda.synchronize(llm.settings.device)
    pages = -(-max(map(len, texts)) // PAGE)
    owned = [range(1 + i * pages, 1 + (i + 1) * pages) for i in range(len(texts))]
    return llm.engine.buffers.fill([Run(texts[i][a:b], a, owned[i], b - a) for i, a, b in step])


def keep_rows(batch: Batch) -> Batch:
    """The same step, which writes nothing that is read: its rows go where those of padding go."""
    return replace(batch, slots=torch.full_like(batch.slots, -1))


def find_logits(llm: LLM, hidden: Tensor, batch: Batch) -> Tensor:
    """As the engine asks for them."""
    return torch.cat([llm.engine.model.logits(hidden[rows]) for rows in batch.logit_rows.split(LOGIT_ROWS)])


@torch.inference_mode()
def repeat(llm: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Logits [n, vocab] of each text by what the idle engine runs, graphs included."""
    logits = Collector(len(texts))
    with on(llm.settings.device):
        for step in plan_steps(texts, starts, llm.settings.max_batch_tokens):
            batch = lay_out(llm, texts, step)
            logits.add(step, find_logits(llm, llm.engine.model.forward(batch, llm.engine.cache), batch))
    return logits.join()


class Both(NamedTuple):
    """What the two models say of one text. Log-probabilities are of each token given those before it."""

    expected: Tensor  # f32 [n - 1]
    imposed: Tensor  # f32 [n - 1] fast, with the reference's selections
    guided: Tensor  # f32 [n - 1] fast, with its selections, its experts and its cached rows
    free: Tensor  # f32 [n - 1] fast, with its own
    logits: Tensor  # f32 [n, vocab] the same
    masses: Tensor  # f32 [layers, n, K] the reference's attention over its selection, the mean over heads
    chosen: Tensor  # i32 [layers, n, K] its selection
    alone: Tensor  # i32 [layers, n, K] the fast path's, each layer on the reference's input
    together: Tensor  # i32 [layers, n, K] the fast path's on its own
    experts: Tensor  # i64 [layers, n, topk] the reference's
    taken: Tensor  # i64 [layers, n, topk] what the fast path would have chosen in their place


@torch.inference_mode()
def run_both(reference: LLM, fast: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Both]:
    """Steps of `plan_steps` through both, side by side."""
    logits, masses, chosen, alone, together, experts, taken = (Collector(len(texts)) for _ in range(7))
    expected, imposed, guided = (Collector(len(texts)) for _ in range(3))
    follower, imposer = (Follower(fast, allocate(fast, texts)) for _ in range(2))
    guide = Follower(fast, reference.engine.cache)  # reads what the reference has written, and writes nothing
    chunk = min(reference.settings.max_batch_tokens, fast.settings.max_batch_tokens)
    models = reference.model, fast.model
    with on(fast.settings.device), routed(*models) as choices, watching(reference.model) as (spy, inputs):
        for step in plan_steps(texts, starts, chunk):
            batch = lay_out(reference, texts, step)
            spy.attention.clear()
            inputs.clear()
            seen: list[Selection] = []
            theirs = choices.begin()
            hidden = reference.engine.model.forward(batch, reference.engine.cache, seen)
            experts.add(step, order(theirs))
            expected.add(step, find_logits(reference, hidden, batch))
            masses.add(step, torch.stack(spy.attention))
            chosen.add(step, torch.stack(seen))
            given, inputs_now = list(seen), list(inputs)
            batch = lay_out(fast, texts, step)
            own = choices.begin(theirs)
            guide.follow(keep_rows(batch), None, given)
            guided.add(step, find_logits(fast, guide.hidden, batch))
            taken.add(step, order(own))
            choices.begin()
            alone.add(step, torch.stack(follower.follow(batch, inputs_now, None)))
            imposer.follow(batch, None, given)
            imposed.add(step, find_logits(fast, imposer.hidden, batch))
            found: list[Selection] = []
            hidden = fast.engine.model.forward(batch, fast.engine.cache, found)
            together.add(step, torch.stack(found))
            logits.add(step, find_logits(fast, hidden, batch))
    columns = [c.join() for c in (expected, imposed, guided, logits, masses, chosen, alone, together, experts, taken)]
    results = []
    for text, a, b, c, d, *rest in zip(texts, *columns, strict=True):
        scores = [score(some, text) for some in (a, b, c, d)]
        results.append(Both(*scores, d, *rest))
    return results


def score(logits: Tensor, text: Sequence[int]) -> Tensor:
    following = torch.tensor(text[1 : 1 + len(logits)], device=logits.device)
    return logits[: len(following)].log_softmax(-1).gather(1, following[:, None])[:, 0]
