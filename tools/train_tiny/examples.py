"""A task's text as tokens, and how strongly each is learned: its kind. Next: data.py makes batches of them."""

from typing import NamedTuple

from saccade.eval.tasks import Text, write_task
from tools.train_tiny.vocabulary import BEGIN_ID, END_ID, encode

TEXT, QUESTION, ANSWER, FREE = 1, 2, 3, 0  # what a token is, for its weight in the loss; FREE: padding, weight 0


class Example(NamedTuple):
    tokens: list[int]
    kinds: list[int]  # TEXT, QUESTION or ANSWER, of each token
    prompt: int  # tokens before the last answer


def assemble(text: Text, length: int) -> Example:
    """<|begin|> text, then each question with its answer and <|end|>; questions that do not fit are left out."""
    tokens = [BEGIN_ID, *encode(text.text)]
    kinds = [TEXT] * len(tokens)
    prompt = 0
    for question in text.questions:
        asked, answer = encode(question.text), [*encode(question.answer), END_ID]
        if prompt and len(tokens) + len(asked) + len(answer) > length:
            break
        tokens += asked
        kinds += [QUESTION] * len(asked)
        prompt = len(tokens)
        tokens += answer
        kinds += [ANSWER] * len(answer)
    return Example(tokens, kinds, prompt)


def make_example(split: str, seed: int, index: int, task: str, length: int = 0) -> Example:
    """The example of a task; `length` in tokens for the long ones."""
    return assemble(write_task(split, seed, index, task, length), length)
