"""How many test problems are answered exactly, by task and length, and how many drafts are right.

One forward pass over problem and reference answer: if at every place of the answer the best token is the reference's,
greedy decoding writes exactly this answer, steps and end included; if at some place it is not, it does not. So this
is greedy exact match of the whole answer, a little stricter than of the result alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from saccade.models.dsa.config import ModelConfig
from tools.train_tiny.data import SHORT, pad
from tools.train_tiny.examples import ANSWER, make_example
from tools.train_tiny.model import Weights, head, run_main, run_mtp

TOKENS = 1 << 16  # of one batch


class Score(NamedTuple):
    task: str
    length: int
    problems: int
    exact: float  # share of the problems
    accepted: float  # share of the answers' tokens, from the second on, where the draft is the main model's choice


@torch.no_grad()
def evaluate(
    w: Weights, c: ModelConfig, lengths: tuple[int, ...], problems: int, sparse: bool, device: torch.device | str
) -> Iterator[Score]:
    for task, length in [("words", SHORT), *((t, n) for n in lengths for t in ("recall", "story"))]:
        exact: list[bool] = []
        accepted = drafted = 0
        step = max(1, TOKENS // length)
        for first in range(0, problems, step):
            some = [make_example("test", 0, i, task, length) for i in range(first, min(first + step, problems))]
            rows = pad(task, some, length)
            tokens = torch.from_numpy(rows.tokens).to(device).long()
            is_answer = torch.from_numpy(rows.kinds).to(device) == ANSWER
            hidden, _ = run_main(w, c, tokens, sparse)
            best = head(w, hidden).argmax(-1)  # of token i + 1, at place i
            wrong = (best[:, :-1] != tokens[:, 1:]) & is_answer[:, 1:]
            exact += (~wrong.any(1)).tolist()
            drafts = head(w, run_mtp(w, c, F.pad(tokens[:, 1:], (0, 1)), hidden, sparse)[0]).argmax(-1)
            counted = is_answer[:, 2:] & is_answer[:, 1:-1]
            accepted += int(((drafts[:, :-2] == best[:, 1:-1]) & counted).sum())
            drafted += int(counted.sum())
        yield Score(task, length, problems, sum(exact) / problems, accepted / drafted)
