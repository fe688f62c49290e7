"""The three tasks, as examples for training and tests: what is asked, what is right, what is learned how strongly.

(a) `words`: a word problem. (b) `recall`: a fact out of a long text. (c) `story`: a word problem whose quantities are
scattered over a long text. An example is a pure function of (split, seed, index). What a question depends on, the
whole problem or the fact, belongs to the tests or to the training by a hash of its text: no test can have occurred in
training, whatever the seeds. Next: data.py makes batches of them.
"""

from functools import partial
from random import Random
from typing import NamedTuple
from zlib import crc32

from tools.train_tiny import passages
from tools.train_tiny.passages import Question
from tools.train_tiny.problems import draw_problem
from tools.train_tiny.vocabulary import BEGIN_ID, END_ID, encode

TASKS = ("words", "recall", "story")
TEST_SHARE = 8  # one of so many problems is for tests
TEXT, QUESTION, ANSWER, FREE = 1, 2, 3, 0  # what a token is, for its weight in the loss; FREE: padding, weight 0
LONGEST = 128  # tokens of a word problem with its answer
TAIL = 96  # in tests: tokens between the last fact and the question, more than index_topk


class Example(NamedTuple):
    tokens: list[int]
    kinds: list[int]  # TEXT, QUESTION or ANSWER, of each token
    prompt: int  # tokens before the last answer


def is_for(split: str, key: str) -> bool:
    """Whether the problem with this text belongs to the split, "train" or "test"."""
    return (crc32(key.encode()) % TEST_SHARE == 0) == (split == "test")


def make_words(split: str, seed: int, index: int, steps: int | None = None) -> Example:
    """(a). At most LONGEST tokens; with one step and no unknown words, at most 50 or so."""
    dice = Random(f"words/{split}/{seed}/{index}")
    while True:
        problem = draw_problem(dice, steps)
        text = " ".join(problem.sentences)
        example = assemble(encode(text), [Question(" " + problem.question, problem.answer, "")], 0)
        if is_for(split, text + problem.question) and len(example.tokens) <= LONGEST:
            return example


def make_long(split: str, seed: int, index: int, length: int, task: str, steps: int | None = None) -> Example:
    """(b), (c), or both ("both", for training only), in at most `length` tokens. A test asks one question; training
    asks as many as fit in 0.4 of the text."""
    dice = Random(f"{task}/{split}/{seed}/{index}/{length}")
    is_test = split == "test"
    allowed = partial(is_for, split)
    groups: list[list[str]] = []
    questions: list[Question] = []
    while not questions:
        groups.clear()
        if task in ("recall", "both"):
            most = min(length // (20 if task == "recall" else 40), 56)
            found = passages.draw_facts(dice, dice.randint(max(2, most // 3), most), allowed)
            groups += found.groups
            questions += found.questions
        if task in ("story", "both"):
            most = min(length // (64 if task == "story" else 128), 14)
            drawn = passages.draw_stories(dice, dice.randint((most + 2) // 3, max(1, most)), allowed, steps)
            groups += drawn.groups
            questions += drawn.questions
    dice.shuffle(questions)
    if is_test:
        del questions[1:]
    room = 2 * length // 5
    asked: list[Question] = []
    for question in questions:
        size = len(encode(question.text + question.answer)) + 2
        if asked and size > room:
            break
        room -= size
        asked.append(question._replace(text=" " + question.text))
    cost = sum(len(encode(q.text + q.answer)) + 1 for q in asked) + 1
    filled = length if is_test else dice.randint(2 * length // 3, length)
    text = passages.scatter(dice, groups, max(filled - cost, 0), TAIL if is_test and length >= 512 else 0)
    return assemble(text, asked, length)


def assemble(text: list[int], questions: list[Question], length: int) -> Example:
    """<|begin|> text, then each question with its answer and <|end|>; questions that no longer fit are left out."""
    tokens, kinds = [BEGIN_ID, *text], [TEXT] * (len(text) + 1)
    prompt = 0
    for question in questions:
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
    return make_words(split, seed, index) if task == "words" else make_long(split, seed, index, length, task)
