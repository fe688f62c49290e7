"""A model of meta tensors, and the steps that an LLM meets: they tell which kernels it needs.

The family's own forward pass runs on the shapes of the load plan, on torch's "meta" device, which has no memory and
computes nothing; the engine's own buffers lay steps out. So every model is served that can be loaded, a step takes some
10 ms a layer, and nothing is written down twice. Only the first layers run, as far as they are not all alike. Knows no
numbers. Next: launches.py notes what they launch; worker.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.api.loading.machine import make_drafter
from saccade.api.settings.resolve import Settings
from saccade.checkpoint.read import TORCH_DTYPES
from saccade.config.file import Config
from saccade.engine.buffers import LEAST_WIDTH, Buffers, Run, StepInputs, round_small
from saccade.engine.model import Model
from saccade.engine.pages import allocate_cache
from saccade.engine.sample import RANDOM, Row, Spec, list_columns
from saccade.engine.scheduling.page_pool import count_pages
from saccade.engine.scheduling.step_kinds import EXACT_PROMPT
from saccade.engine.speculate import MOST_DRAFTS, Ask, StepKind, draft_and_verify, fill_columns
from saccade.engine.steps.choose import find_draw, run_and_choose
from saccade.kernels import PAGE
from saccade.kernels.types import CAPTURED_TOKENS, MIXED_TOKENS
from saccade.models.parameters import Layout
from saccade.models.registry import fetch_place, find_cache_rows, find_family
from saccade.plan.types import Stored
from saccade.weights.weights import Weights

META = "meta"  # torch's device of tensors that have a shape, a dtype and strides, and no memory
FIRST_PROMPT = 128  # tokens, of the first answer that is made ready
WIDE_PROMPTS = (1, 2, 3, 8, 16, 32, 64, 128, 256, 4096)  # sizes of steps whose kernels a longer context may change


class MetaShape(NamedTuple):
    """All that decides which kernels a model needs on one rank."""

    config: Config
    stored: Mapping[str, Stored]
    layout: Layout
    settings: Settings


class MetaStep(NamedTuple):
    """`requests` that run `tokens` each, the last of them at position `context` - 1; then `drafts` are made."""

    requests: int
    tokens: int
    context: int
    drafts: int = 0
    rounds: bool = False  # whether inputs of products are rounded, as of long prompts


class MetaRanks:
    """A rank without the others: what would come from them has the right shape."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def add_up(self, part: Tensor) -> Tensor:
        return part

    def gather(self, part: Tensor, width: int) -> Tensor:
        return part.new_empty(len(part), width)

    def collect(self, text: str) -> list[str]:
        return [text] * self.layout.tp

    def check(self) -> None: ...


class MetaModel:
    """The model, its cache, and the engine's buffers."""

    def __init__(self, shape: MetaShape, device: str = META) -> None:
        """`device`: "cpu" for tensors that have memory, which is not written to."""
        config, s, self.device = shape.config, shape.settings, device
        family = find_family(config.model_type)
        assert family.gpu is not None, "kernels of a family that has none"
        dtypes = {t.name: (t.shape, TORCH_DTYPES[t.dtype]) for t in shape.stored.values()}
        tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in dtypes.items()}
        ops = fetch_place(family.gpu)(ranks=MetaRanks(shape.layout), activations=s.activations)
        model: Any = fetch_place(family.model)(config, Weights(tensors, kept=shape.stored), ops)
        model.layers = model.layers[: count_unlike_layers(shape)]
        self.model: Model = model
        self.cache = allocate_cache(
            config, s.pages, s.dtype, device, s.mtp, s.index_cache, s.max_requests, shape.layout, s.latent_cache
        )
        pages, small = count_pages(find_longest(s)), max(CAPTURED_TOKENS, MIXED_TOKENS)  # as engine/graphs.py has it
        self.buffers = Buffers(device, s.max_batch_tokens, s.max_requests, pages, small, bool(self.cache.states))


def open_meta_model(shape: MetaShape) -> Callable[[MetaStep], None]:
    """What runs steps of a model."""
    return partial(run_step, MetaModel(shape))


@torch.inference_mode()
def run_step(meta: MetaModel, step: MetaStep) -> None:
    """As the engine does, for requests that sample: greedy ones need no other kernels."""
    model, cache, guesses = meta.model, meta.cache, min(step.drafts, step.tokens - 1)
    pages = range(1, -(-(step.context + step.drafts) // PAGE) + 1)
    one = Run([0] * step.tokens, step.context - step.tokens, pages, guesses + 1, ahead=step.drafts, slot=1)
    batch = meta.buffers.fill([one] * step.requests, step.rounds)
    inputs = StepInputs(batch, list_columns([], len(batch.logit_rows)).to(meta.device))
    if step.drafts:
        asks = [Ask([Row()] * (guesses + 1), [0] * guesses, [0] * step.tokens, ())] * step.requests
        columns = fill_columns(asks, batch, step.drafts).to(meta.device)
        draft_and_verify(make_drafter(model), inputs, cache, columns, StepKind(step.drafts, RANDOM))
    else:
        run_and_choose(model, batch, cache, Spec(inputs.wants, RANDOM, find_draw(model.ops)))


def forget_sizes(settings: Settings) -> Settings:
    """Without what changes no kernel, and with a cache of as many tokens as a request has, a number of three binary
    digits: the memory that is free is another one at each start."""
    pages = count_pages(find_longest(settings))
    unit = 1 << max(0, pages.bit_length() - 3)
    return replace(
        settings, path="", device="", cache_tokens=pages // unit * unit * PAGE, cache_bytes=0, state_bytes=0, threads=1,
        notes=(), check_ranks=False, prefix_cache=False, launch_ahead="off",
    )  # fmt: skip


def find_longest(settings: Settings) -> int:
    """Tokens of the longest request."""
    return min(settings.max_length, settings.cache_tokens)


def count_unlike_layers(shape: MetaShape) -> int:
    """Layers up to the last that has parameters or cache rows like none before it."""
    rows, kinds, count = find_cache_rows(shape.config, False, shape.layout), set[object](), 0
    parts: dict[int, list[str]] = {}
    for stored in shape.stored.values():
        place, _, leaf = stored.name.removeprefix("model.layers.").partition(".")
        if place.isdecimal():
            parts.setdefault(int(place), []).append(f"{leaf} {stored[1:]}")
    for i in range(shape.config.num_hidden_layers):
        kind = (tuple(sorted(parts.get(i, ()))), rows[i])
        if kind not in kinds:
            kinds.add(kind)
            count = i + 1
    return count


def group_steps(settings: Settings) -> list[list[MetaStep]]:
    """The steps of an LLM, a group for each time at which they are wanted: of a first answer, of other prompts, of many
    requests, of long contexts; and of prompts in the other kind of step than usual for their length. What takes longest
    to compile, kernels of one token, comes first."""
    most, drafts = find_longest(settings), list_drafts(settings.speculate)
    can_round = settings.activations != "exact"

    def run_prompt(tokens: int, context: int, is_usual: bool = True) -> MetaStep:
        return MetaStep(1, tokens, context, max(drafts), can_round and (tokens > EXACT_PROMPT) == is_usual)

    decodes = list_sizes(min(settings.max_requests, CAPTURED_TOKENS))
    prompts = list_sizes(min(settings.max_batch_tokens, most - 1))
    widths = [LEAST_WIDTH << i for i in range(1, 16) if LEAST_WIDTH << i < count_pages(most)]
    first = min(FIRST_PROMPT, max(prompts))
    wide = list[MetaStep]()
    for context in [*(PAGE * width for width in widths), most]:
        at = context - max(drafts)
        wide += list_steps([n for n in WIDE_PROMPTS if n in decodes], at, drafts)
        wide += [run_prompt(n, at) for n in WIDE_PROMPTS if n in prompts and n <= at]
    groups = [
        [*list_steps([1], first, drafts), run_prompt(first, first)],
        [run_prompt(n, n) for n in prompts],
        list_steps(decodes, first, drafts),
        wide,
    ]
    return [*groups, [run_prompt(n, n, is_usual=False) for n in prompts]] if can_round else groups


def list_sizes(most: int) -> list[int]:
    """Of steps: the buckets that hold 1 to `most`, as far as there are so many."""
    return sorted({min(round_small(n), most) for n in range(1, most + 1)})


def list_steps(requests: Sequence[int], context: int, drafts: Sequence[int]) -> list[MetaStep]:
    """Decodes of so many requests, each with as many drafts to verify as are made."""
    return [MetaStep(n, k + 1, context, k) for n in requests for k in drafts if k < context]


def list_drafts(speculate: int | str) -> list[int]:
    """How many drafts steps may make, the usual first."""
    if isinstance(speculate, int):
        return [speculate, 0][: 1 + (speculate > 0)]
    return list(range(MOST_DRAFTS + 1))
