"""Answers in a file: written by --record, read by --replay, so that a comparison needs the server only once.

JSON lines: a head, then a prompt with its answer on each line. Knows no server. Next: answers.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saccade.base.json_text import to_json
from saccade.base.printable import escape
from saccade.base.result_file import write_result
from saccade.base.strict_json import parse_json
from saccade.base.values import is_count, is_integer, is_number, show
from saccade.compare.answers import ComparedPrompt, GivenAnswer
from saccade.compare.questions import parse_question
from saccade.errors import RequestError

RECORD_VERSION = 1
RECORD_KEY = "saccade_compare"  # of the head
MOST_RECORD_BYTES = 1 << 30


class RecordedAnswers:
    """What somebody answered before, by the names of prompts."""

    def __init__(self, title: str, prompts: list[ComparedPrompt], answers: dict[str, GivenAnswer]) -> None:
        self.title, self.prompts, self._answers = title, prompts, answers

    def answer(self, prompt: ComparedPrompt, tokens: Sequence[int], max_tokens: int) -> GivenAnswer:
        """As it was then."""
        return self._answers[prompt.name]


def write_record(path: str, title: str, given: Sequence[tuple[ComparedPrompt, GivenAnswer]]) -> None:
    lines: list[dict[str, Any]] = [{RECORD_KEY: RECORD_VERSION, "server": title}]
    for prompt, answer in given:
        asked = {"text": prompt.text, "messages": prompt.messages, "token_ids": prompt.token_ids}
        named = {"prompt" if key == "text" else key: value for key, value in asked.items() if value is not None}
        lines.append({"id": prompt.name, **named, "answer": vars(answer)})
    write_result("--record", path, "".join(to_json(line) + "\n" for line in lines))


def read_record(path: str) -> RecordedAnswers:
    """RequestError names the first line that is broken."""
    try:
        raw = Path(path).read_bytes() if Path(path).stat().st_size <= MOST_RECORD_BYTES else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"--replay: {escape(path) or 'an empty name'} cannot be read: {reason}") from None
    prompts, answers, title = list[ComparedPrompt](), dict[str, GivenAnswer](), ""
    for number, line in enumerate(raw.splitlines(), 1):
        where = f"--replay: {escape(path)}: line {number}"
        try:
            values, twice = parse_json(line)
        except ValueError as error:
            raise RequestError(f"{where} is no JSON object: {error}") from None
        if not isinstance(values, dict) or twice:
            raise RequestError(f"{where}: expected a JSON object with each key once, found {show(values)}")
        if number == 1:
            if values.get(RECORD_KEY) != RECORD_VERSION or not isinstance(values.get("server"), str):
                raise RequestError(
                    f'{where}: expected {{"{RECORD_KEY}": {RECORD_VERSION}, "server": ...}}, as --record writes'
                )
            title = values["server"]
            continue
        answer = read_recorded_answer(values.pop("answer", None), where)
        prompt = parse_question(values, f"{number - 1}", where)
        if prompt.name in answers:
            raise RequestError(f"{where}: a prompt named {show(prompt.name)} is there already")
        prompts.append(prompt)
        answers[prompt.name] = answer
    if not prompts:
        raise RequestError(f"--replay: {escape(path)} holds no answer; expected a file that --record has written")
    return RecordedAnswers(title, prompts, answers)


def read_recorded_answer(value: Any, where: str) -> GivenAnswer:
    """An answer out of JSON."""
    if not isinstance(value, dict) or set(value) != set(GivenAnswer.__dataclass_fields__):
        raise RequestError(
            f"{where}: answer: expected {', '.join(GivenAnswer.__dataclass_fields__)}, found {show(value)}"
        )
    for key, is_right, noun in (
        ("tokens", is_integer, "token ids"), ("logprobs", is_number, "numbers"),
        ("prompt_logprobs", is_number, "numbers"), ("read_tokens", is_integer, "token ids"),
    ):  # fmt: skip
        given = value[key]
        is_free = given is None and key in ("prompt_logprobs", "read_tokens")
        if not is_free and not (isinstance(given, list) and all(map(is_right, given))):
            raise RequestError(f"{where}: answer: {key}: expected a list of {noun}, found {show(given)}")
    if value["read_count"] is not None and not is_count(value["read_count"], 0):
        raise RequestError(
            f"{where}: answer: read_count: expected a number of tokens, found {show(value['read_count'])}"
        )
    return GivenAnswer(**value)
