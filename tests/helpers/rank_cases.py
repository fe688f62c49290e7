"""What ranks do in tests: functions of a rank's `DistributedRanks`, run by rank_pool.py. All ranks run the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.api.prepare import prepare
from saccade.parallel.distributed import DistributedRanks
from saccade.parallel.ranks import Ranks


def open_llm(ranks: Ranks, root: Path | None, **options: Any) -> LLM:
    """This rank's share of a model."""
    options = {"device": "cpu", "cache_tokens": 1024} | options
    return LLM.of(prepare(root, layout=ranks.layout, **options), ranks=ranks)


class Answer(NamedTuple):
    scores: list[float]
    tokens: list[list[int]]
    selections: list[Tensor]


def answer(ranks: Ranks, root: Path, prompts: Sequence[Sequence[int]], options: dict[str, Any]) -> Answer:
    """Scores of the first prompt, and greedy answers to all with their selections."""
    llm = open_llm(ranks, root, **options)
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    found = llm.generate(list(prompts), greedy, capture_selection=True)
    selections = [torch.stack(list(c.selections)) for c in found if c.selections is not None]
    return Answer(llm.score(prompts[0]), [c.token_ids for c in found], selections)


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
