"""Held-out problems, as text: what is asked, and the result that is right."""

from typing import NamedTuple

from tools.train_tiny.tasks import TASKS as TASKS
from tools.train_tiny.tasks import make_example
from tools.train_tiny.vocabulary import build_tokenizer

TOKENIZER = build_tokenizer()


class Problem(NamedTuple):
    task: str
    prompt: str
    result: str  # what must stand after the last ####


def draw_problem(task: str, index: int, length: int) -> Problem:
    """Problem `index` of a task, the same everywhere; a long text has about `length` tokens."""
    example = make_example("test", 0, index, task, length)
    prompt = TOKENIZER.decode(example.tokens[1 : example.prompt])
    answer = TOKENIZER.decode(example.tokens[example.prompt :])
    return Problem(task, prompt, answer.rpartition("####")[2].strip())
