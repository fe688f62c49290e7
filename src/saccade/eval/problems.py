"""Word problems of one to four steps, and stories whose sentences can be scattered over a long text.

The text of an answer is its steps, a line each, and `#### ` with the result. Numbers never leave 0 to 199. Which
problems are for training and which for tests is decided in tasks.py.
"""

from random import Random
from typing import NamedTuple

from saccade.eval import wording as w

LARGEST_NUMBER = 199


class WorkedStep(NamedTuple):
    """a sign b = result."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b, "/": self.a // self.b}[self.sign]

    def __str__(self) -> str:
        return f"{self.a} {self.sign} {self.b} = {self.result}"


class WordProblem(NamedTuple):
    sentences: list[str]  # in the order of the story
    question: str
    lines: list[str]  # of the worked answer
    result: int

    @property
    def answer(self) -> str:
        """What follows the question."""
        return "".join(f"\n{line}" for line in self.lines) + f"\n#### {self.result}"


class Impossible(Exception):
    """The numbers drawn so far allow no such step; draw again."""


class Story:
    """Sentences about one person's things, with the count so far. Each method adds a sentence and its steps."""

    def __init__(self, dice: Random, names: list[str], things: str):
        self.dice = dice
        self.name, self.other = names
        self.is_he = self.name in w.HE or (self.name not in w.SHE and dice.random() < 0.5)
        self.things, self.container = things, dice.choice(w.CONTAINERS)
        self.sentences: list[str] = []
        self.steps: list[WorkedStep] = []
        self.count = 0

    def say(self, patterns: tuple[str, ...], **slots: object) -> None:
        self.sentences.append(self.fill(self.dice.choice(patterns), **slots))

    def fill(self, pattern: str, **slots: object) -> str:
        """People who were named may become he, she, him or her, but not where that could mean the other one."""
        by_pronoun = bool(self.sentences) and self.dice.random() < 0.6 and "{M}" not in pattern
        subject, inner = (("He", "he") if self.is_he else ("She", "she")) if by_pronoun else (self.name, self.name)
        him = ("him" if self.is_he else "her") if self.dice.random() < 0.6 else self.name
        people = {"N": self.name, "M": self.other, "P": subject, "p": inner, "T": him}
        return pattern.format(**people, o=self.things, c=self.container, **slots)

    def step(self, a: int, sign: str, b: int) -> int:
        step = WorkedStep(a, sign, b)
        if not 0 <= step.result <= LARGEST_NUMBER or max(a, b) > LARGEST_NUMBER or (sign == "/" and a % b):
            raise Impossible
        self.steps.append(step)
        return step.result

    def draw_groups(self) -> tuple[int, int]:
        return self.dice.randint(2, 9), self.dice.randint(2, 12)

    def start(self) -> None:
        self.count = self.dice.randint(5, 60)
        self.say(w.HAS, a=self.count)

    def start_groups(self) -> None:
        k, m = self.draw_groups()
        self.count = self.step(k, "*", m)
        self.say(w.HAS_GROUPS, k=k, m=m)

    def change(self) -> None:
        """Gain or lose some."""
        is_gain, b = self.draw_change()
        self.say(w.GAINS if is_gain else w.LOSSES, b=b)

    def draw_change(self) -> tuple[bool, int]:
        is_gain, b = self.dice.random() < 0.5, self.dice.randint(2, 30)
        if not is_gain and b >= self.count:
            raise Impossible
        self.count = self.step(self.count, "+" if is_gain else "-", b)
        return is_gain, b

    def gain_groups(self) -> None:
        k, m = self.draw_groups()
        self.count = self.step(self.count, "+", self.step(k, "*", m))
        self.say(w.GAINS_GROUPS, k=k, m=m)

    def compare(self) -> None:
        """The other person's count, said by this one's."""
        kind = self.dice.choice("+-*")
        b = self.dice.randint(2, 30) if kind != "*" else self.dice.randint(2, 5)
        if kind == "-" and b >= self.count:
            raise Impossible
        patterns = {"+": w.MORE_THAN, "-": w.FEWER_THAN, "*": w.TIMES_AS_MANY}[kind]
        mine = self.count
        self.count = self.step(mine, kind, b)
        self.say(patterns, b=b, k=b)
        self.mine = mine

    def draw_divisor(self) -> int:
        fitting = [k for k in range(2, 11) if self.count % k == 0 and self.count > k]
        if not fitting:
            raise Impossible
        return self.dice.choice(fitting)


def draw_names(dice: Random) -> list[str]:
    """Two people; now and then one whose name is in no list, spelled byte by byte."""
    return [invent(dice).capitalize() if dice.random() < 0.05 else name for name in dice.sample(w.NAMES, 2)]


def draw_things(dice: Random) -> str:
    return invent(dice) + "s" if dice.random() < 0.05 else dice.choice(w.OBJECTS)


def invent(dice: Random) -> str:
    return "".join(dice.choices(w.SYLLABLES, k=dice.randint(2, 3)))


def make_chain(dice: Random, steps: int) -> WordProblem:
    """A start, changes, an end: `steps` steps in all."""
    story = Story(dice, draw_names(dice), draw_things(dice))
    ends = ["now", "now", "share", "other", "compare", "compare, together"]
    cost = {"now": 0, "share": 1, "other": 1, "compare": 1, "compare, together": 2}
    end = dice.choice([e for e in ends if cost[e] <= steps and (steps > 1 or e != "now" or dice.random() < 0.9)])
    left = steps - cost[end]
    if left and dice.random() < 0.3:
        story.start_groups()
        left -= 1
    else:
        story.start()
    while left:
        if left >= 2 and dice.random() < 0.2:
            story.gain_groups()
            left -= 2
        else:
            story.change()
            left -= 1
    return finish_story(story, end_story(story, end))


def finish_story(story: Story, question: str) -> WordProblem:
    return WordProblem(story.sentences, question, [str(step) for step in story.steps], story.steps[-1].result)


def end_story(story: Story, end: str) -> str:
    """Add what the end needs and return the question."""
    dice = story.dice
    if end == "now":
        return story.fill(dice.choice(w.ASK_NOW))
    if end == "share":
        k = story.draw_divisor()
        story.container = dice.choice(w.CONTAINERS)
        pattern = dice.randrange(len(w.SHARES))
        story.sentences.append(story.fill(w.SHARES[pattern], k=k))
        story.step(story.count, "/", k)
        return story.fill(dice.choice((w.ASK_FRIEND, w.ASK_CHILD, w.ASK_HOLDER)[pattern]))
    if end == "other":
        b = dice.randint(2, 60)
        story.step(story.count, "+", b)
        story.say(w.OTHER_HAS, b=b)
        return story.fill(dice.choice(w.ASK_TOGETHER))
    story.compare()
    if end == "compare":
        return story.fill(dice.choice(w.ASK_OTHER))
    story.step(story.mine, "+", story.count)
    return story.fill(dice.choice(w.ASK_TOGETHER))


def make_purchase(dice: Random, steps: int) -> WordProblem:
    """Things at a price; from three steps on, two kinds of things; with two or four, the change."""
    first, second = dice.sample(w.OBJECTS, 2)
    story = Story(dice, dice.sample(w.NAMES, 2), first)
    k, m = story.draw_groups()
    story.say(w.PRICES, m=m)
    story.sentences.append(story.fill(dice.choice(w.BUYS), k=k))
    paid = story.step(k, "*", m)
    if steps >= 3:
        k, m = story.draw_groups()
        story.things = second
        paid = story.step(paid, "+", story.step(k, "*", m))
        story.say(w.BUYS_TOO, k=k, m=m)
    if steps % 2:
        return finish_story(story, story.fill(dice.choice(w.ASK_PRICE)))
    b = paid + dice.randint(1, 40)
    story.step(b, "-", paid)
    story.say(w.PAYS, b=b)
    return finish_story(story, story.fill(dice.choice(w.ASK_CHANGE)))


def make_far_story(dice: Random, name: str, things: str, steps: int) -> WordProblem:
    """A story that survives being scattered: each sentence names its person, and its day if the order matters.

    The question names the last day, so that nobody has to prove that no sentence was missed.
    """
    story = Story(dice, [name, name], things)
    has, has_groups, change, share = w.FAR_TELLS
    lines: list[str] = []
    shares = steps > 1 and dice.random() < 0.25

    def tell(patterns: tuple[str, ...], line: str, **slots: object) -> None:
        slots |= {"N": name, "o": things, "c": story.container, "step": story.steps[-1] if story.steps else ""}
        story.sentences.append(dice.choice(patterns).format(**slots))
        lines.append(line.format(**slots))

    changes = steps - shares
    if changes > 1 and dice.random() < 0.25:
        k, m = story.draw_groups()
        story.count = story.step(k, "*", m)
        tell(w.FAR_HAS_GROUPS, has_groups, k=k, m=m)
        changes -= 1
    else:
        story.count = dice.randint(5, 60)
        tell(w.FAR_HAS, has, a=story.count, day=w.DAYS[0])
    for day in w.DAYS[:changes]:
        is_gain, b = story.draw_change()
        tell(w.FAR_CHANGES, change, day=day, v=dice.choice(w.FAR_GAINS if is_gain else w.FAR_LOSSES), b=b)
    slots: dict[str, object] = {"N": name, "o": things, "day": w.DAYS[changes - 1]}
    if not shares:
        return WordProblem(story.sentences, dice.choice(w.FAR_ASK_NOW).format(**slots), lines, story.count)
    slots["k"] = k = story.draw_divisor()
    result = story.step(story.count, "/", k)
    lines.append(share.format(k=k, step=story.steps[-1]))
    return WordProblem(story.sentences, dice.choice(w.FAR_ASK_SHARE).format(**slots), lines, result)


def draw_problem(dice: Random, steps: int | None = None) -> WordProblem:
    """A word problem of `steps` steps, 1 to 4; None: any."""
    while True:
        n = steps or dice.randint(1, 4)
        try:
            problem = make_purchase(dice, n) if dice.random() < 0.15 else make_chain(dice, n)
        except Impossible:
            continue
        if len(problem.lines) == n:
            return problem


def draw_far_story(dice: Random, name: str, things: str, steps: int | None = None) -> WordProblem:
    while True:
        try:
            return make_far_story(dice, name, things, steps or dice.randint(1, 4))
        except Impossible:
            continue
