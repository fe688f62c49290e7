"""Batches: a pure function of the seed and the step, so that a resumed run sees what an uninterrupted one would have.

A step has short rows (word problems, one each, and early on rows of bare sums) and long rows (recall and stories) of
the length that the curriculum is at. Rows are padded at the end. Knows no model and no device.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saccade.eval.problems import LARGEST_NUMBER, WorkedStep
from saccade.eval.tasks import LONGEST_PROBLEM
from tools.train_tiny.examples import ANSWER, TEXT, Example, make_example
from tools.train_tiny.vocabulary import BEGIN_ID, encode

SHORT = LONGEST_PROBLEM  # tokens of a short row
LONG_TASKS = ("recall", "recall", "story", "story", "both")  # in turn


class Rows(NamedTuple):
    """Examples of one kind, padded to one length."""

    name: str  # for the log: "words", or the length of long ones
    tokens: NDArray[np.int16]  # [rows, length], 0 behind the end
    kinds: NDArray[np.int16]  # the same: TEXT, QUESTION, ANSWER; FREE behind the end


class Shape(NamedTuple):
    """What a step is made of: one kind of rows or both."""

    short: int = 0  # rows of SHORT tokens
    long: int = 0  # rows of `length` tokens
    length: int = SHORT
    sums: float = 0.0  # share of the short rows that are bare sums


def make_batch(seed: int, step: int, shape: Shape) -> list[Rows]:
    """The rows of one step: short ones, long ones; groups without rows are left out."""
    first = step * 4096  # indices of examples: no step has more rows
    bare = int(shape.short * shape.sums)
    short = [make_sums(seed, first + i) for i in range(bare)]
    short += [make_example("train", seed, first + i, "words") for i in range(bare, shape.short)]
    turn = len(LONG_TASKS)
    long = [
        make_example("train", seed, first + i, LONG_TASKS[(first + i) % turn], shape.length) for i in range(shape.long)
    ]
    groups = (("words", short, SHORT), (str(shape.length), long, shape.length))
    return [pad(name, examples, length) for name, examples, length in groups if examples]


def pad(name: str, examples: Sequence[Example], length: int) -> Rows:
    tokens = np.zeros((len(examples), length), dtype=np.int16)
    kinds = np.zeros((len(examples), length), dtype=np.int16)
    for i, example in enumerate(examples):
        n = min(len(example.tokens), length)
        tokens[i, :n], kinds[i, :n] = example.tokens[:n], example.kinds[:n]
    return Rows(name, tokens, kinds)


def make_sums(seed: int, index: int) -> Example:
    """A row of bare sums, as they stand in worked answers: they teach the tables before the reading is learned."""
    dice = Random(f"sums/{seed}/{index}")
    tokens, kinds = [BEGIN_ID], [TEXT]
    while len(tokens) < SHORT:
        sign = dice.choice("++--*/")
        if sign in "+-":
            a, b = dice.randint(2, LARGEST_NUMBER), dice.randint(2, 60)
        else:
            a, b = dice.randint(2, 60), dice.randint(2, 12)
        step = WorkedStep(a * b if sign == "/" else a, sign, b)
        if step.a <= LARGEST_NUMBER and 0 <= step.result <= LARGEST_NUMBER:
            ids = encode(f"\n{step}")
            tokens += ids
            kinds += [TEXT] * (len(ids) - 1) + [ANSWER]
    return Example(tokens[:SHORT], kinds[:SHORT], 1)
