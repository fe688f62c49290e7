"""Long texts: facts and stories scattered among sentences that lead nowhere, and questions at the end.

A passage is built as tokens, because it must fill a given length. Which questions may be asked in training and which
in tests is decided by the caller, in tasks.py.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from tools.train_tiny import wording as w
from tools.train_tiny.problems import Problem, draw_far_story
from tools.train_tiny.vocabulary import WITHOUT_SPACE, encode


class Question(NamedTuple):
    """Asked at the end of a passage. `key` is what must not occur in both training and tests."""

    text: str
    answer: str
    key: str


class Passage(NamedTuple):
    """Sentences with what can be asked about them. `order` groups the sentences that must keep their order."""

    groups: list[list[str]]
    questions: list[Question]


def draw_facts(dice: Random, count: int, is_allowed: Callable[[str], bool]) -> Passage:
    """About `count` facts in a grid: several people have the same key and each has several, so that neither the
    person nor the key alone tells which fact is asked for."""
    height = min(max(2, round(count**0.5 * dice.uniform(0.6, 1.6))), count, 24)
    people = dice.sample(w.NAMES, height)
    places = dice.sample(w.PLACES, min(len(w.PLACES), dice.randint(2, 2 + count // height)))
    keys = [f"{place} {secret}" for place in places for secret in w.SECRETS]
    keys = dice.sample(keys, min(len(keys), -(-count // height)))
    pairs = [(name, key) for name in people for key in keys]
    groups, questions = [], []
    for name, key in dice.sample(pairs, min(count, len(pairs))):
        least, most = w.SECRETS[key.split()[1]]
        words = dice.sample(w.VALUES, dice.randint(least, most)) if most else []
        value = " ".join(words) or str(dice.randint(200, 999))
        groups.append([dice.choice(w.FACTS).format(key=key, N=name, value=value)])
        if is_allowed(groups[-1][0]):
            text = dice.choice(w.ASK_FACT).format(key=key, N=name)
            questions.append(Question(text, f"\n#### {value}", groups[-1][0]))
    return Passage(groups, questions)


def draw_stories(dice: Random, count: int, is_allowed: Callable[[str], bool], steps: int | None = None) -> Passage:
    """`count` stories about different people, often about the same things."""
    groups, questions = [], []
    things = dice.sample(w.OBJECTS, dice.choice((1, 2, count)))
    for name in dice.sample(w.NAMES, count):
        problem: Problem = draw_far_story(dice, name, dice.choice(things), steps)
        groups.append(problem.sentences)
        key = " ".join([*problem.sentences, problem.question])
        if is_allowed(key):
            questions.append(Question(problem.question, problem.answer, key))
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


def scatter(dice: Random, groups: list[list[str]], length: int, tail: int) -> list[int]:
    """Token ids of a text of about `length` tokens (never more, unless the groups alone are longer) with the sentences
    of `groups` at random places, each group in its order, and at least `tail` tokens of filler behind them."""
    told = [[encode(" " + sentence) for sentence in group] for group in groups]
    room = length - sum(len(ids) for group in told for ids in group)
    fillers: list[list[int]] = []
    behind: list[int] = []
    while room > 0:
        ids = encode(" " + draw_filler(dice))
        room -= len(ids)
        if room < 0:
            break
        if len(behind) < tail:
            behind += ids
        else:
            fillers.append(ids)
    places = [i for i, group in enumerate(told) for _ in group] + [-1] * len(fillers)
    dice.shuffle(places)
    queues = [iter(group) for group in told]
    rest = iter(fillers)
    text: list[int] = []
    for place in places:
        text += next(rest) if place < 0 else next(queues[place])
    text += behind
    return [WITHOUT_SPACE[text[0]], *text[1:]]
