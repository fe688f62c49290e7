"""What ranks do in tests: functions of a rank's `DistributedRanks`, run by rank_pool.py. All ranks run the same."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ledger_engines import watch_launches
from tiny_models import page_table, step_batch
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.api.loading.prepare import PreparedModel, prepare
from saccade.engine.pages import allocate_cache
from saccade.errors import NumericsError
from saccade.models.dsa.transformer import Transformer
from saccade.ops.gpu import Gpu
from saccade.ops.reference import Reference
from saccade.parallel.distributed import DistributedRanks
from saccade.parallel.place import RankPlace
from saccade.parallel.ranks import Ranks
from saccade.weights.loader import load


def prepare_share(ranks: Ranks, root: Path | None, **options: Any) -> PreparedModel:
    options = {"device": "cpu", "cache_tokens": 1024} | options
    tp, ep, rank = ranks.layout
    return prepare(root, tp=tp, ep=ep, place=RankPlace(rank, tp, rank, tp), **options)


def open_llm(ranks: Ranks, root: Path | None, **options: Any) -> LLM:
    """This rank's share of a model."""
    return LLM.of(prepare_share(ranks, root, **options), ranks=ranks)


class Answer(NamedTuple):
    scores: list[float]
    tokens: list[list[int]]
    selections: list[Tensor]
    drafts: tuple[float, ...]  # shares that were right


def answer(ranks: Ranks, root: Path, prompts: Sequence[Sequence[int]], options: dict[str, Any]) -> Answer:
    """Scores of the first prompt, and greedy answers to all with their selections."""
    llm = open_llm(ranks, root, **options)
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    found = llm.generate(list(prompts), greedy, capture_selection=True)
    selections = [torch.stack(list(c.selections)) for c in found if c.selections is not None]
    return Answer(llm.score(prompts[0]), [c.token_ids for c in found], selections, tuple(llm.stats.tally.shares))


class Texts(NamedTuple):
    tokens: list[list[int]]
    preemptions: int
    drafts: tuple[float, ...]


def write_texts(ranks: Ranks, prompts: Sequence[str], tokens: int, options: dict[str, Any]) -> Texts:
    """Answers of the bundled model: every second prompt greedily, the others sampled by a seed."""
    llm = open_llm(ranks, None, **options)
    params = [SamplingParams(temperature=float(i % 2), seed=i, max_tokens=tokens) for i in range(len(prompts))]
    found = llm.generate(list(prompts), params)
    return Texts([c.token_ids for c in found], llm.engine.scheduler.preemptions, tuple(llm.stats.tally.shares))


class Launches(NamedTuple):
    tokens: list[list[int]]
    launched: list[tuple[int, bool]]  # requests of each step, and whether it was launched ahead


def launch_ahead(ranks: Ranks, prompts: Sequence[str], how: str) -> Launches:
    """Answers of the bundled model whose lengths differ, every second one sampled, with the setting that a GPU has."""
    prepared = prepare_share(ranks, None, dtype="float32", max_requests=17, max_batch_tokens=96, cache_tokens=2048)
    prepared = replace(prepared, settings=replace(prepared.settings, launch_ahead=how))
    llm = LLM.of(prepared, ranks=ranks)
    launched = watch_launches(llm.engine)
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=5 + i % 7) for i in range(len(prompts))]
    found = llm.generate(list(prompts), params)
    return Launches([c.token_ids for c in found], launched)


def explain(ranks: Ranks, root: Path, prompts: Sequence[Sequence[int]], spoiled: str, rank: int) -> str:
    """The error of prompts where one number of parameter `spoiled` of `rank` is NaN."""
    llm = open_llm(ranks, root)
    if ranks.layout.rank == rank:
        llm._loaded.held[spoiled].view(-1)[5] = torch.nan
    try:
        llm.generate(list(prompts), SamplingParams(max_tokens=3, temperature=0.0))
    except NumericsError as error:
        return str(error)
    return ""


class Steps(NamedTuple):
    hidden: list[Tensor]  # of the main model, then of the MTP layer, of each step
    selections: list[Tensor]
    logits: list[Tensor]


def run_steps(ranks: Ranks, root: Path, sizes: Sequence[int], is_fast: bool) -> Steps:
    """Steps of so many tokens of one request behind a prefill, in kernels or as the reference says."""
    prepared = prepare_share(ranks, root, cache_tokens=128)
    model = Transformer(prepared.config, load(prepared.plan), Reference(ranks))
    steps = model.with_ops(Gpu(ranks=ranks)) if is_fast else model
    assert model.mtp is not None and steps.mtp is not None
    tokens = torch.randint(0, 96, (61 + sum(sizes),), generator=torch.Generator().manual_seed(1))
    table, cache = page_table([len(tokens)]), allocate_cache(prepared.config, 4, "auto", "cpu", mtp=True)
    found, first = Steps([], [], []), 0
    with torch.inference_mode():
        for i, size in enumerate((60, *sizes)):
            by = steps if i else model
            batch = step_batch([(0, tokens[first : first + size].tolist(), first)], table)
            seen = list[Tensor]()
            x = by.run(batch, cache, seen)
            state = by.ops.normalize(x, by.norm)  # as `forward` does; `find_logits` would run the layers again
            assert by.mtp is not None
            drafted, selection = by.mtp.forward(batch, tokens[first + 1 : first + size + 1], state, cache)
            found.hidden.extend([state, drafted])
            found.selections.extend([*seen, selection])
            found.logits.extend([by.logits(state[-1:]), by.ops.project_head(x, by.norm, by.lm_head)])
            first += size
    return found


def add_up(ranks: DistributedRanks, parts: list[Tensor]) -> tuple[Tensor, int]:
    """The sum, and how many bytes this rank sent."""
    return ranks.add_up(parts[ranks.layout.rank].clone()), ranks.traffic.bytes


def gather(ranks: DistributedRanks, parts: list[Tensor], width: int) -> Tensor:
    return ranks.gather(parts[ranks.layout.rank], width)


def pass_on(ranks: DistributedRanks, tensor: Tensor, text: str) -> tuple[Tensor, list[str]]:
    """What the last rank holds, and a text of each rank."""
    last = ranks.layout.tp - 1
    held = tensor if ranks.layout.rank == last else torch.zeros_like(tensor)
    ranks.broadcast(held, last)
    return held, ranks.collect(text * ranks.layout.rank)
