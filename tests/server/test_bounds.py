"""What a hostile request may cost before it is refused: work that grows with the model's limits, not with the body."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import Client

from saccade.checkpoint.open import bundled_path
from saccade.server.bodies import MOST_KEYS, MOST_OBJECTS
from saccade.server.service import COUNTED
from saccade.text import tokenizer
from saccade.text.tokenizer import PIECE, Tokenizer, TooLongError
from tools.request_fields import PATHS

LONG = "Tom has 12 apples. " * 100_000  # 1.9 MB; the context has 4,096 tokens


class CountingEncoder:
    """A tokenizer that notes how many tokens it has made."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.made = encoder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_batch_fast(self, texts: list[str], **more: Any) -> Any:
        found = self.encoder.encode_batch_fast(texts, **more)
        self.made += sum(len(each.ids) for each in found)
        return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CountingEncoder]]:
    """The encoders of all tokenizers that are loaded in a test."""
    found = list[CountingEncoder]()
    begin = Tokenizer.__init__

    def count(self: Tokenizer, encoder: Any, *more: Any, **named: Any) -> None:
        found.append(CountingEncoder(encoder))
        begin(self, found[-1], *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Tokenizer, "__init__", count)
    yield found


@pytest.mark.parametrize(
    ("path", "body", "contexts"),
    [
        ("/v1/completions", {"prompt": LONG}, 1),
        ("/v1/completions", {"prompt": ["a", LONG]}, 1),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, 1),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 9}, 1),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": LONG}]}, COUNTED),
        ("/v1/responses", {"input": LONG}, 1),
        ("/tokenize", {"prompt": LONG}, COUNTED),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, COUNTED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_prompt_that_is_far_too_long_is_not_encoded_whole(
    made: list[CountingEncoder], path: str, body: Any, contexts: int
) -> None:
    client = Client()
    limit = client.engine.ready.longest
    told = client.post(path, body)
    error = told.json()["error"]
    assert told.status_code == 400 and "prompt is too long" in error["message"]
    assert error.get("code", "context_length_exceeded") == "context_length_exceeded"
    most = 2 * contexts * limit + PIECE  # one piece more than what is sure to be too long
    assert 0 < sum(encoder.made for encoder in made) <= most < len(LONG) / 8


@pytest.mark.parametrize("path", PATHS)
def test_a_list_is_judged_up_to_its_first_wrong_entry(path: str) -> None:
    """In every request, and in every list inside of one: 6 MB of nulls took 59 s, 3.9 GB and the engine."""

    def find_lists(schema: Any) -> Iterator[dict[str, Any]]:
        for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list | tuple) else ():
            yield from find_lists(part)
        if isinstance(schema, dict) and schema.get("type") == "list":
            yield schema

    assert all(schema.get("fail_fast") for schema in find_lists(PATHS[path].__pydantic_core_schema__))
    wrong = {"prompt": [None] * 1000, "messages": [{}] * 1000, "input": [3] * 1000, "tools": [None] * 1000}
    told = Client().post(path, {**wrong, "tokens": ["a"] * 1000})
    more = re.search(r"and ([0-9]+) more", told.json()["error"]["message"])
    assert told.status_code == 400 and more and int(more[1]) < 20


def test_objects_and_their_keys_have_an_end() -> None:
    client, ask = Client(), {"role": "user", "content": "a"}
    for path, body, words in (
        ("/v1/chat/completions", {"messages": [ask] * (MOST_OBJECTS + 1)}, "the body has more than 65,536 objects"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(MOST_KEYS + 1)}}, "an object of the body has 8,193 keys"),
        ("/v1/completions", {"prompt": "a", "guided_choice": ["a"] * 20_000}, "guided_choice: "),
        ("/v1/completions", {"prompt": [1] * 5000}, "the prompt is too long: 5,000 tokens; context and cache have room for 4,096"),
    ):  # fmt: skip
        told = client.post(path, body)
        assert told.status_code == 400 and told.json()["error"]["message"].startswith(words), told.text
    assert client.engine.prompts == []


def test_a_text_that_may_fit_is_encoded_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces only count: what is returned is the whole text's, whatever the cuts."""
    monkeypatch.setattr(tokenizer, "PIECE", 10)
    found = Tokenizer.load(bundled_path())
    assert found is not None
    text = "Tom has 12 apples, and Zoë has none. " * 20
    tokens = found.encode(text)
    for most in (len(tokens), len(tokens) - 1, len(tokens) // 2 + 60):
        assert found.encode(text, most) == tokens and found.encode_rendered(text, most) == tokens[1:]
    with pytest.raises(TooLongError, match="prompt is too long: it has far more than 100 tokens"):
        found.encode(text, 100)


def test_more_prompts_than_allowed_are_refused_before_any_is_encoded(made: list[CountingEncoder]) -> None:
    client = Client(max_prompts=8)
    told = client.post("/v1/completions", {"prompt": ["abc"] * 5, "n": 2})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "prompt")
    assert "10 answers in one request; expected 8 at most" in told.json()["error"]["message"]
    assert sum(encoder.made for encoder in made) == 0
    assert client.post("/v1/completions", {"prompt": ["abc"] * 4, "n": 2}).status_code == 200
