"""Long texts: facts and stories scattered among sentences that lead nowhere, and questions at the end.

Lengths are in pieces, which are the bundled model's tokens. The caller, tasks.py, decides which questions belong to
training and which to tests.
"""

import re
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from saccade.eval import wording as w
from saccade.eval.problems import WordProblem, draw_far_story

# A text is cut into words with the space before them, numbers of at most three digits, signs and single spaces.
WORD_PIECE = r"'s| ?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s"
PIECES = re.compile(WORD_PIECE)


def count_pieces(text: str) -> int:
    """How many tokens a text has for the bundled model, unless it holds words or numbers that it does not know."""
    return len(PIECES.findall(text))


class Question(NamedTuple):
    """Asked at the end of a passage."""

    text: str
    answer: str


class Passage(NamedTuple):
    """Sentences with what can be asked about them. Sentences of one group keep their order."""

    groups: list[list[str]]
    questions: list[Question]


def draw_facts(dice: Random, count: int, is_allowed: Callable[[str], bool]) -> Passage:
    """`count` facts, each about a person and a key: several people have the same key, and a person may have several,
    so that neither alone tells which fact is asked for."""
    names = dice.sample(w.NAMES, min(len(w.NAMES), max(2, round(count * dice.uniform(0.4, 1.0)))))
    keys = [f"{place} {secret}" for place in w.PLACES for secret in w.SECRETS]
    keys = dice.sample(keys, dice.randint(-(-count // len(names)), len(keys)))
    groups, questions = [], []
    for pair in dice.sample(range(len(names) * len(keys)), count):
        name, key = names[pair % len(names)], keys[pair // len(names)]
        least, most = w.SECRETS[key.split()[1]]
        words = dice.sample(w.VALUES, dice.randint(least, most)) if most else []
        value = " ".join(words) or str(dice.randint(10, 199))
        groups.append([dice.choice(w.FACTS).format(key=key, N=name, value=value)])
        told = w.FACTS[0].format(key=key, N=name, value=value)
        if is_allowed(told):
            questions.append(Question(dice.choice(w.ASK_FACT).format(key=key, N=name), f"\n{told}\n#### {value}"))
    return Passage(groups, questions)


def draw_stories(dice: Random, count: int, is_allowed: Callable[[str], bool], steps: int | None = None) -> Passage:
    """`count` stories about different people, often about the same things."""
    groups, questions = [], []
    things = dice.sample(w.OBJECTS, dice.choice((1, 2, count)))
    for name in dice.sample(w.NAMES, count):
        problem: WordProblem = draw_far_story(dice, name, dice.choice(things), steps)
        groups.append(problem.sentences)
        key = " ".join([*problem.sentences, problem.question])
        if is_allowed(key):
            questions.append(Question(problem.question, problem.answer))
    return Passage(groups, questions)


def draw_filler(dice: Random) -> str:
    choice = dice.choice
    adjective, adjective2 = dice.sample(w.ADJECTIVES, 2)
    spot, spot2 = dice.sample(w.SPOTS, 2)
    thing, thing2 = dice.sample(w.THINGS, 2)
    animal, animal2 = dice.sample(w.ANIMALS, 2)
    return choice(w.FILLERS).format(
        adjective=adjective, adjective2=adjective2, spot=spot, spot2=spot2, thing=thing, thing2=thing2,
        animal=animal, animal2=animal2, motion=choice(w.MOTIONS), sky=choice(w.SKIES), X=choice(w.NAMES),
        n=dice.randint(2, 99),
    )  # fmt: skip


def scatter(dice: Random, groups: list[list[str]], length: int, tail: int) -> str:
    """A text of about `length` pieces (never more, unless the groups alone are longer) with the sentences of `groups`
    at random places, each group in its order, and at least `tail` pieces of filler behind them."""
    room = length - sum(count_pieces(" " + sentence) for group in groups for sentence in group)
    fillers: list[str] = []
    behind: list[str] = []
    while room > 0:
        filler = draw_filler(dice)
        size = count_pieces(" " + filler)
        room -= size
        if room < 0:
            break
        (behind if tail > 0 else fillers).append(filler)
        tail -= size
    places = [i for i, group in enumerate(groups) for _ in group] + [-1] * len(fillers)
    dice.shuffle(places)
    queues = [iter(group) for group in groups]
    rest = iter(fillers)
    return " ".join([next(rest if place < 0 else queues[place]) for place in places] + behind)
