"""The three tasks: what is asked and what is right, for training and for tests.

(a) `words`: a word problem. (b) `recall`: a fact out of a long text. (c) `story`: a word problem whose quantities are
scattered over a long text. A task's text is a pure function of (split, seed, index). What a question depends on, the
whole problem or the fact, belongs to the tests or to the training by a hash of its text: no test can have been asked
in training, whatever the seeds (told among others, unasked, it may have been). Next: passages.py, problems.py, and
wording.py for the words.
"""

from functools import partial
from random import Random
from typing import NamedTuple
from zlib import crc32

from saccade.eval import passages
from saccade.eval.passages import Question, count_pieces
from saccade.eval.problems import draw_problem

TASKS = ("words", "recall", "story")
TEST_SHARE = 8  # one of so many problems is for tests
LONGEST_PROBLEM = 128  # pieces of a word problem with its answer
MOST_FACTS = 120
TAIL = 96  # in tests: pieces between the last fact and the question, more than the bundled model's index_topk


class Text(NamedTuple):
    """A text and what is asked about it, in this order; a question begins with a space, an answer with a line break."""

    text: str
    questions: list[Question]


class TaskQuestion(NamedTuple):
    """One held-out question."""

    task: str
    prompt: str
    answer: str  # worked
    result: str  # what stands behind its ####


def is_for(split: str, key: str) -> bool:
    """Whether the problem with this text belongs to the split, "train" or "test"."""
    return (crc32(key.encode()) % TEST_SHARE == 0) == (split == "test")


def write_words(split: str, seed: int, index: int, steps: int | None = None) -> Text:
    """(a). At most LONGEST pieces; with one step and no unknown words, at most 50 or so."""
    dice = Random(f"words/{split}/{seed}/{index}")
    while True:
        problem = draw_problem(dice, steps)
        text = " ".join(problem.sentences)
        question = Question(" " + problem.question, problem.answer)
        # words that nobody knows have a token a byte, 6 at most for each of their two to four pieces
        if is_for(split, text + problem.question) and count_pieces(text + "".join(question)) < LONGEST_PROBLEM - 28:
            return Text(text, [question])


def write_long(split: str, seed: int, index: int, length: int, task: str, steps: int | None = None) -> Text:
    """(b), (c), or both ("both", for training only), in at most `length` pieces with <|begin|> and an <|end|> behind
    each answer. A test asks one question; training asks as many as fit in 0.4 of the text."""
    dice = Random(f"{task}/{split}/{seed}/{index}/{length}")
    is_test = split == "test"
    allowed = partial(is_for, split)
    groups: list[list[str]] = []
    questions: list[Question] = []
    while not questions:
        groups.clear()
        if task in ("recall", "both"):
            most = min(length // (16 if task == "recall" else 32), MOST_FACTS)
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
    cost = 1
    for question in questions:
        size = count_pieces(" " + question.text + question.answer) + 1
        if asked and cost + size > room:
            break
        cost += size
        asked.append(question._replace(text=" " + question.text))
    filled = length if is_test else dice.randint(2 * length // 3, length)
    text = passages.scatter(dice, groups, max(filled - cost, 0), TAIL if is_test and length >= 512 else 0)
    return Text(text, asked)


def write_task(split: str, seed: int, index: int, task: str, length: int = 0) -> Text:
    """The text of a task; `length` in pieces for the long ones."""
    return write_words(split, seed, index) if task == "words" else write_long(split, seed, index, length, task)


def draw_test(task: str, index: int, length: int = 0) -> TaskQuestion:
    """Held-out problem `index` of a task, the same everywhere; a long text has about `length` pieces."""
    text, questions = write_task("test", 0, index, task, length)
    question, answer = questions[0]
    return TaskQuestion(task, text + question, answer, answer.rpartition("####")[2].strip())
