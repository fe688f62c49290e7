"""The prompts that are compared: those of a file, or some that every model with a tokenizer can read.

An indexer can only be wrong about texts of more than `index_topk` tokens, so some are longer. Knows no server. Next:
answers.py; eval/tasks.py, which writes the texts.
"""

from typing import Any

from saccade.api.llm import LLM
from saccade.base.printable import escape
from saccade.base.strict_json import parse_json
from saccade.base.values import is_integer, show
from saccade.compare.answers import ComparedPrompt
from saccade.errors import RequestError
from saccade.eval.tasks import draw_test

QUESTION_KEYS = ("prompt", "messages", "token_ids")
LEAST_PIECES = 192  # of a long text
OPEN = 3  # texts to go on from
ROOM = 128  # tokens that stay free for an answer


def read_questions(raw: bytes, name: str) -> list[ComparedPrompt]:
    """Every line of a file of JSON lines. RequestError for the first one that is wrong."""
    prompts, names = list[ComparedPrompt](), set[str]()
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"--prompts: {name}: line {number}"
        try:
            values, twice = parse_json(line.strip())
        except ValueError as error:
            raise RequestError(f"{where} is no JSON object: {error}") from None
        if not isinstance(values, dict) or twice:
            raise RequestError(f"{where}: expected a JSON object with each key once, found {show(values)}")
        prompt = parse_question(values, str(number), where)
        if prompt.name in names:
            raise RequestError(f"{where}: id: a prompt named {show(prompt.name)} is there already")
        names.add(prompt.name)
        prompts.append(prompt)
    if not prompts:
        raise RequestError(f'--prompts: {name} holds no line; expected lines like {{"prompt": "..."}}')
    return prompts


def parse_question(values: dict[str, Any], name: str, where: str) -> ComparedPrompt:
    """One prompt: {"prompt" | "messages" | "token_ids": ..., "id": ...}."""
    for key in values:
        if key not in (*QUESTION_KEYS, "id"):
            raise RequestError(f"{where}: unknown key {show(key)}; known: {', '.join((*QUESTION_KEYS, 'id'))}")
    given = [key for key in QUESTION_KEYS if values.get(key) is not None]
    if len(given) != 1:
        raise RequestError(
            f"{where}: expected one of {', '.join(QUESTION_KEYS)}, found {' and '.join(given) or 'none'}"
        )
    name = values["id"] if values.get("id") is not None else name
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RequestError(f"{where}: id: expected a text or an integer, found {show(name)}")
    key, value = given[0], values[given[0]]
    if key == "prompt":
        if not isinstance(value, str) or not value:
            raise RequestError(f"{where}: prompt: expected a text, found {show(value)}")
        return ComparedPrompt(str(name), text=value)
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where}: {key}: expected a list, found {show(value)}")
    if key == "token_ids":
        if not all(map(is_integer, value)):
            raise RequestError(f"{where}: token_ids: expected integers, found {show(value)}")
        return ComparedPrompt(str(name), token_ids=value)
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value):
        raise RequestError(f'{where}: messages: expected objects with "role" and "content", found {show(value)}')
    return ComparedPrompt(str(name), messages=value)


def draw_questions(llm: LLM) -> list[ComparedPrompt]:
    """A short question, a long one, long texts to go on from, and a chat if the model has chats.

    Long is more than `index_topk` tokens. An answer to a question is nearly certain, whatever the engine does; what
    follows in a text is not, so that differences show in its log-probabilities.
    """
    if llm.tokenizer is None:
        raise RequestError(f"compare: {llm.no_text}: give prompts of token ids with --prompts FILE")
    topk = getattr(llm.config, "index_topk", 0)
    room = min(llm.settings.max_length, llm.settings.cache_tokens) - ROOM
    length = max(LEAST_PIECES, topk + topk // 4)
    while length > LEAST_PIECES and len(llm.encode(draw_test("recall", 0, length).prompt)) > room:
        length = max(LEAST_PIECES, length * 3 // 4)
    found = [ComparedPrompt("short", text=draw_test("words", 0).prompt)]
    long, *others = (draw_test("recall", i, length).prompt for i in range(1 + OPEN))
    found.append(ComparedPrompt("long", text=long))
    found += [ComparedPrompt(f"open-{i + 1}", text=text[: 7 * len(text) // 8]) for i, text in enumerate(others)]
    if llm.chat_format is not None:
        found.append(ComparedPrompt("chat", messages=[{"role": "user", "content": draw_test("words", 1).prompt}]))
    return [prompt for prompt in found if len(prompt.read(llm)) <= room]


def name_file(path: str) -> str:
    return "standard input" if path == "-" else escape(path) or "an empty name"
