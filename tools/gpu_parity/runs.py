"""Two models of a family on the same steps: one on its kernels, one on its operations in plain torch. The first runs on
its own, then with the inputs and the selections of the second.

Next: compare.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.api.llm import LLM
from saccade.engine.buffers import Run
from saccade.engine.pages import allocate_cache, clear_states
from saccade.engine.sample import LOGIT_ROWS
from saccade.engine.scheduling.step_kinds import EXACT_PROMPT
from saccade.eval.probe import make_spy
from saccade.kernels import PAGE
from saccade.kernels.streams import Unwritten
from saccade.kernels.types import Chosen, Norm, Routing, Selection, StreamMixer
from saccade.models.dsa.transformer import Transformer
from saccade.models.glm5_next.gpu import FlashGpu
from saccade.models.glm5_next.operations import Streams
from saccade.models.glm5_next.transformer import FlashModel
from saccade.models.registry import fetch_place, find_family
from saccade.ops.device import on
from saccade.ops.interface import Embedding, Ops, Residual
from saccade.ops.step import Batch, Cache
from saccade.ops.step import Step as LayerStep

Steered = Transformer | FlashModel
TAIL = 5  # the last tokens of a prompt are a step of their own: few tokens of one request


def attends(cache: Cache, layer: int) -> bool:
    """Whether a layer attends, and so has a selection; else it is recurrent."""
    return cache.latent[layer].data.shape[1] > 0


def read_input(x: Residual) -> Tensor:
    """The numbers in front of a layer of operations in plain torch: [T, hidden], or streams [T, n, hidden]."""
    numbers: Tensor = x.value.values if isinstance(x.value, Streams) else x.value
    return numbers


def write_input(model: Steered, positions: Tensor, numbers: Tensor, norm: Norm) -> Residual:
    """The residual in front of a layer that begins with `norm`, from what `read_input` gave."""
    if numbers.ndim == 2:  # as if they were the rows of an embedding
        rows = torch.arange(len(numbers), device=numbers.device)
        return model.ops.begin(rows, positions, Embedding(numbers, len(numbers)), model.rotary, norm)[0]
    if not isinstance(model.ops, FlashGpu):
        return Residual(Streams(numbers), norm)
    count, n, hidden = numbers.shape  # kernels take streams with a block's output that is not added yet: of nothing
    mix = torch.cat([numbers.new_zeros(n), torch.eye(n, device=numbers.device).flatten()]).expand(count, -1)
    balanced = StreamMixer(*[numbers] * 3, n, 1, 0.0, 0.0)  # whose one step changes nothing
    nothing = numbers.new_zeros(count, hidden)
    return Residual(Unwritten(numbers.contiguous(), nothing, mix.contiguous(), balanced), norm)


class Follower:
    """A model layer by layer on another model's inputs, or with another model's selections."""

    def __init__(self, model: Steered, cache: Cache) -> None:
        self.model, self.cache = model, cache

    def follow(self, batch: Batch, inputs: list[Tensor] | None, given: list[Selection] | None) -> list[Selection]:
        """Selections of a step, whose last hidden state is `hidden`. inputs: of each layer, see `read_input`."""
        selections = iter(given or ())

        def steer(i: int, x: Residual, own: Selection | None, step: LayerStep) -> tuple[Residual, Selection | None]:
            if inputs is not None:
                x = write_input(self.model, batch.positions, inputs[i], x.norm)
            return x, own if given is None or not attends(self.cache, i) else next(selections)

        seen: list[Selection] = []
        self.hidden = self.model.forward(batch, self.cache, seen, steer)
        return seen


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

    def note(self, chosen: Chosen, logits: Tensor, scaling: float) -> Chosen:
        experts, weights = chosen
        self._noted.append(experts)
        if self._given is None:
            return experts, weights
        given = next(self._given)
        scores = logits.sigmoid().gather(1, given.long())
        return given.to(experts.dtype), scores / (scores.sum(1, keepdim=True) + 1e-20) * scaling


class Choosing:
    """Beside operations: all choices of experts go through `choices`."""

    choices: Choices

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        chosen: Chosen = super().choose_experts(logits, routing)  # type: ignore[misc]
        return self.choices.note(chosen, logits, routing.scaling)


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
    """Rows [..., T, n] of steps, brought to their texts. Where steps differ in n, `fill` stands behind the shorter."""

    def __init__(self, texts: int, fill: int = -1) -> None:
        self._parts: list[list[Tensor]] = [[] for _ in range(texts)]
        self._fill = fill

    def add(self, step: Step, rows: Tensor) -> None:
        row = 0
        for i, a, b in step:
            self._parts[i].append(rows[..., row : row + b - a, :].clone())
            row += b - a

    def join(self) -> list[Tensor]:
        widest = max(part.shape[-1] for parts in self._parts for part in parts)
        return [
            torch.cat([pad(part, (0, widest - part.shape[-1]), value=self._fill) for part in parts], -2)
            for parts in self._parts
        ]


def allocate(llm: LLM, texts: Sequence[Sequence[int]]) -> Cache:
    """For the pages of `lay_out`."""
    s, pages = llm.settings, 1 + len(texts) * -(-max(map(len, texts)) // PAGE)
    return allocate_cache(
        llm.config, pages, s.dtype, s.device, s.mtp, s.index_cache, len(texts), latent_cache=s.latent_cache
    )


def lay_out(llm: LLM, texts: Sequence[Sequence[int]], step: Step) -> Batch:
    """Waits for the step before, whose image on the host is overwritten."""
    if llm.settings.device.startswith("cuda"):
        torch.cuda.synchronize(llm.settings.device)
    pages = -(-max(map(len, texts)) // PAGE)
    owned = [range(1 + i * pages, 1 + (i + 1) * pages) for i in range(len(texts))]
    runs = [Run(texts[i][a:b], a, owned[i], b - a, slot=i + 1) for i, a, b in step]
    _, start, end = step[0]
    return llm.engine.buffers.fill(runs, rounds=end - start > 1 and end > EXACT_PROMPT)  # of a prompt, not of decodes


def begin_anew(llm: LLM, texts: Sequence[Sequence[int]]) -> None:
    """As requests that have just begun, in the idle engine's cache."""
    clear_states(llm.engine.cache, range(1, len(texts) + 1))


class Reading:
    """A cache that reads another one's rows, and has states of its own, which begin each step with the other's."""

    def __init__(self, other: Cache) -> None:
        self._other = other
        states = tuple({name: state.clone() for name, state in layer.items()} for layer in other.states)
        self.cache = replace(other, states=states)

    def begin(self) -> None:
        """The states before the step that both will run."""
        for mine, theirs in zip(self.cache.states, self._other.states, strict=True):
            for name, state in theirs.items():
                mine[name].copy_(state)


def keep_rows(batch: Batch) -> Batch:
    """The same step, which writes no row that is read: its rows go where those of padding go."""
    return replace(batch, slots=torch.full_like(batch.slots, -1))


def find_logits(llm: LLM, hidden: Tensor, batch: Batch) -> Tensor:
    """As the engine asks for them."""
    return torch.cat([llm.engine.model.logits(hidden[rows]) for rows in batch.logit_rows.split(LOGIT_ROWS)])


@torch.inference_mode()
def repeat(llm: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Logits [n, vocab] of each text by what the idle engine runs, graphs included."""
    logits = Collector(len(texts))
    begin_anew(llm, texts)
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


def noting(choices: Choices) -> type[Choosing]:
    return type("Noting", (Choosing,), {"choices": choices})


def choosing(llm: LLM, choices: Choices) -> Ops:
    """The operations of a model, whose choices go through `choices`."""
    model_type, activations = llm.config.model_type, llm.settings.activations
    if llm.settings.kernels != "fast":
        return make_spy(model_type, activations, noting(choices))
    ops: Ops = type("ChoosingGpu", (noting(choices), fetch_place(find_family(model_type).gpu)), {})(
        activations=activations
    )
    return ops


@torch.inference_mode()
def run_both(reference: LLM, fast: LLM, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Both]:
    """Steps of `plan_steps` through both, side by side."""
    logits, chosen, alone, together, experts, taken = (Collector(len(texts)) for _ in range(6))
    masses = Collector(len(texts), 0)
    expected, imposed, guided = (Collector(len(texts)) for _ in range(3))
    choices = Choices()
    spy = make_spy(
        reference.config.model_type, reference.settings.activations, type("", (Choosing,), {"choices": choices})
    )
    watched, model = reference.model.with_ops(spy), fast.model.with_ops(choosing(fast, choices))
    follower, imposer = (Follower(model, allocate(fast, texts)) for _ in range(2))
    reading = Reading(reference.engine.cache)
    guide = Follower(model, reading.cache)
    inputs: list[Tensor] = []

    def keep(i: int, x: Residual, own: Selection | None, step: LayerStep) -> tuple[Residual, Selection | None]:
        inputs.append(read_input(x))
        return x, own

    chunk = min(reference.settings.max_batch_tokens, fast.settings.max_batch_tokens)
    begin_anew(reference, texts)
    begin_anew(fast, texts)
    with on(fast.settings.device):
        for step in plan_steps(texts, starts, chunk):
            batch = lay_out(fast, texts, step)  # for both: padded to the same sizes
            spy.attention.clear()
            inputs.clear()
            reading.begin()
            seen: list[Selection] = []
            theirs = choices.begin()
            hidden = watched.forward(batch, reference.engine.cache, seen, keep)
            experts.add(step, order(theirs))
            expected.add(step, find_logits(reference, hidden, batch))
            masses.add(step, torch.stack(spy.attention))
            chosen.add(step, torch.stack(seen))
            given, inputs_now = list(seen), list(inputs)
            own = choices.begin(theirs)
            guide.follow(keep_rows(batch), None, given)
            guided.add(step, find_logits(fast, guide.hidden, batch))
            taken.add(step, order(own))
            choices.begin()
            alone.add(step, torch.stack(follower.follow(batch, inputs_now, None)))
            imposer.follow(batch, None, given)
            imposed.add(step, find_logits(fast, imposer.hidden, batch))
            found: list[Selection] = []
            choices.begin()
            hidden = model.forward(batch, fast.engine.cache, found)
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
