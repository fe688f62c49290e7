"""What a hostile request may cost before it is refused: work that grows with the model's limits, not with the body."""

from collections.abc import Iterator
from typing import Any

import pytest
from api_client import Client

from saccade.checkpoint.open import bundled_path
from saccade.server.service import COUNTED
from saccade.text import tokenizer
from saccade.text.tokenizer import PIECE, Tokenizer, TooLongError

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
