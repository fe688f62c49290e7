"""The tasks of `saccade eval`: every answer follows from its text, and no test occurs in training."""

import re

import pytest

from saccade.eval import tasks, wording
from saccade.eval.evaluate import LONGEST_ANSWER
from saccade.eval.tasks import draw_test, write_long, write_words
from tools.train_tiny.config import CONFIG

LONG = {length: (("recall", length), ("story", length)) for length in (256, 1024)}


@pytest.mark.parametrize("task,length", [("words", 0), *LONG[256], *LONG[1024]])
def test_every_step_and_result_is_right(task: str, length: int) -> None:
    for i in range(30):
        problem = draw_test(task, i, length)
        lines = problem.answer.strip().split("\n")
        assert lines.pop() == f"#### {problem.result}"
        if task == "recall":
            told = lines.pop().removeprefix("The ").removesuffix(".")
            key, name, value = re.fullmatch(r"(\w+ \w+) of (\w+) is (.+)", told).groups()  # type: ignore[union-attr]
            assert not lines and value == problem.result
            facts = [s for s in re.split(r"(?<=[.?]) ", problem.prompt)[:-1] if f"{key} of {name} is" in s]
            assert len(facts) == 1 and facts[0].endswith(f" is {value}.")
            question = re.split(r"(?<=[.?]) ", problem.prompt)[-1]
            assert key in question and name in question.replace("?", "").split()
            continue
        steps = [re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)$", line) for line in lines]
        for step in [s for s in steps if s]:
            a, sign, b, total = step.groups()
            known = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}
            assert known[sign] == int(total) and 0 <= int(total) <= 199
        assert lines[-1].endswith(f"= {problem.result}") and 1 <= len([s for s in steps if s]) <= 4
        assert None not in steps[1:] and (task == "story" or steps[0])


def test_a_storys_result_follows_from_its_sentences() -> None:
    """Solved again from the text alone, by the verbs and up to the day that is asked for."""
    days = list(wording.DAYS)
    for i in range(60):
        problem = draw_test("story", i, 512)
        sentences = re.split(r"(?<=[.?]) ", problem.prompt)
        asked = sentences[-1] if "After" not in sentences[-2].split()[:1] else " ".join(sentences[-2:])
        name = next(n for n in wording.NAMES if n in asked.replace("?", "").replace(",", "").split())
        things = next(o for o in wording.OBJECTS if f" {o} " in asked)
        last = next(days.index(d) for d in days if d in asked)
        count = 0
        for sentence in sentences:
            numbers = [int(n) for n in re.findall(r"\d+", sentence)]
            if sentence in asked:
                count = count // numbers[0] if numbers else count
                continue
            if f" {name} " not in f" {sentence} " or f" {things}" not in sentence or not numbers:
                continue
            if " has " in sentence:
                count = numbers[0] * (numbers[1] if len(numbers) > 1 else 1)
            elif next(days.index(d) for d in days if f"n {d} " in sentence) <= last:
                verb = re.search(rf"{name} (\w+) ", sentence).group(1)  # type: ignore[union-attr]
                assert (verb in wording.FAR_GAINS) != (verb in wording.FAR_LOSSES)
                count += numbers[0] if verb in wording.FAR_GAINS else -numbers[0]
        assert problem.result == str(count), problem


def test_long_texts_have_the_length_that_was_asked_for() -> None:
    for task in ("recall", "story"):
        for length in (256, 1024, 4096):
            problem = draw_test(task, 1, length)
            size = tasks.count_pieces(problem.prompt + problem.answer) + 2  # with the begin and the end
            assert length - 24 <= size <= length


def test_a_fact_is_asked_for_from_far_away() -> None:
    for i in range(10):
        problem = draw_test("recall", i, 1024)
        told = problem.prompt.rindex(f" is {problem.result}.")
        assert tasks.count_pieces(problem.prompt[told:]) > 64 > CONFIG["index_topk"]


def test_a_fact_is_not_told_by_its_person_or_its_key_alone() -> None:
    shared_key = shared_person = 0
    for i in range(20):
        problem = draw_test("recall", i, 1024)
        key, name = re.search(r"The (\w+ \w+) of (\w+) is", problem.answer).groups()  # type: ignore[union-attr]
        shared_key += len(re.findall(rf"{key} of \w+ is", problem.prompt)) > 1
        shared_person += len(re.findall(rf"\w+ \w+ of {name} is", problem.prompt)) > 1
    assert shared_key >= 10 and shared_person >= 8


def test_no_test_problem_occurs_in_training() -> None:
    tests = {draw_test("words", i).prompt for i in range(60)}
    assert len(tests) == 60
    for split, is_test in (("test", True), ("train", False)):
        for i in range(60):  # not by luck: the hash of the text decides
            text, [question] = write_words(split, 0, i, steps=1)
            assert tasks.is_for("test", text + question.text.strip()) is is_test
    asked = {split: {q for i in range(40) for q in find_asked(split, i)} for split in ("test", "train")}
    assert asked["test"] and asked["train"] and not asked["test"] & asked["train"]
    assert all(tasks.is_for("test", fact) for fact in asked["test"])


def find_asked(split: str, index: int) -> list[str]:
    """The facts that the questions of a long text ask for, as they are told."""
    return [q.answer.strip().split("\n")[0] for q in write_long(split, 0, index, 512, "recall").questions]


def test_right_answers_fit_into_what_an_answer_may_have() -> None:
    for task, length in (("words", 0), ("recall", 1024), ("story", 1024)):
        longest = max(tasks.count_pieces(draw_test(task, i, length).answer) + 1 for i in range(200))
        assert LONGEST_ANSWER[task] * 0.4 < longest < LONGEST_ANSWER[task]


def test_a_problem_is_the_same_whenever_it_is_drawn() -> None:
    assert draw_test("story", 7, 512) == draw_test("story", 7, 512) != draw_test("story", 8, 512)
    training = write_long("train", 1, 7, 512, "story")
    assert training == write_long("train", 1, 7, 512, "story") != write_long("train", 2, 7, 512, "story")
    assert len(training.questions) > 1
