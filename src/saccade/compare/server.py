"""An OpenAI-compatible server as the one who answers: vLLM, SGLang, Saccade and others.

Prompts go there as token ids, so that both sides read the same; chats go as messages, because how they are rendered is
in question. The tokens of an answer come by id where a server can tell them, else by text. Fields that a server refuses
are left out. Knows no arithmetic. Next: tokens.py, which reads what came back.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from saccade.base.printable import escape
from saccade.base.values import is_integer, show
from saccade.compare.answers import ComparedPrompt, GivenAnswer
from saccade.compare.tokens import AnswerTokens
from saccade.errors import RequestError

ANSWER_TIMEOUT = httpx.Timeout(600.0, connect=10.0)  # an answer to a long prompt takes its time
REFUSED = (400, 404, 422, 501)
IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}  # vLLM's
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")


class ServerAnswers:
    """A server, asked about one checkpoint's tokens."""

    def __init__(self, url: str, tokens: AnswerTokens, model: str | None = None, key: str | None = None) -> None:
        """`tokens`: of the checkpoint; `model`: its name there; None: the first that the server names. RequestError if
        no such server answers."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or not has_port(parts):
            raise RequestError(f"--server: expected an address such as http://127.0.0.1:8000, found {show(url)}")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        is_own = parts.hostname in OWN_HOSTS
        self.client = httpx.Client(headers=headers, timeout=ANSWER_TIMEOUT, trust_env=not is_own, follow_redirects=True)
        self.tokens = tokens
        self.model = model or self._find_model()
        self.title = f"{self.model} at {self.url}"
        self._left_out: dict[str, tuple[str, ...]] = {}  # by path: fields that this server refuses

    def answer(self, prompt: ComparedPrompt, tokens: Sequence[int], max_tokens: int) -> GivenAnswer:
        """The likeliest answer. RequestError says what of it is missing."""
        body = {"model": self.model, "max_tokens": max_tokens, "temperature": 0.0, **IDS}
        if prompt.messages is not None:
            given = self._ask("/v1/chat/completions", body | {"messages": prompt.messages, "logprobs": True})
            choice = self._choose(given, "/v1/chat/completions")
            answer, logprobs = self.tokens.read_chat(choice, self.title)
            return GivenAnswer(answer, logprobs, None, *self._read_chat_prompt(prompt, given))
        asked = body | {"prompt": list(tokens), "logprobs": 1, "echo": True}
        given = self._ask("/v1/completions", asked)
        choice = self._choose(given, "/v1/completions")
        answer, logprobs, echoed = self.tokens.read_completion(choice, len(tokens), self.title)
        read = (None, None) if prompt.text is None else self._read_text(prompt.text)
        return GivenAnswer(answer, logprobs, echoed, *read)

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """A JSON answer. Extensions that the server refuses are left out, one kind after the other, and for good."""
        kinds = [self._left_out[path]] if path in self._left_out else [(), ("echo",), tuple(IDS), ("echo", *IDS)]
        for left_out in kinds:
            told = self._post(path, {name: value for name, value in body.items() if name not in left_out})
            if told.status_code not in REFUSED or left_out == kinds[-1]:
                break
        if told.status_code != 200:
            raise RequestError(f"{self.url}{path}: {told.status_code}, {find_reason_told(told)}")
        self._left_out[path] = left_out
        return self._parse(told, path)

    def _post(self, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            return self.client.get(self.url + path) if body is None else self.client.post(self.url + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise RequestError(f"{self.url}: no answer ({reason}): does a server run there?") from None

    def _parse(self, told: httpx.Response, path: str) -> Any:
        try:
            found = told.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            shown = show(told.text[:60])
            raise RequestError(f"{self.url}{path}: expected JSON as OpenAI's API has it, found {shown}")
        return found

    def _choose(self, given: Any, path: str) -> Mapping[str, Any]:
        choices = given.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise RequestError(f'{self.url}{path}: expected "choices" as OpenAI\'s API has them, found {show(given)}')
        # Some tell the ids of the prompt beside the choices.
        return {"prompt_token_ids": given.get("prompt_token_ids"), "usage": given.get("usage"), **choices[0]}

    def _find_model(self) -> str:
        told = self._post("/v1/models", None)
        if told.status_code != 200:
            raise RequestError(f"{self.url}/v1/models: {told.status_code}, {find_reason_told(told)}")
        found = self._parse(told, "/v1/models").get("data")
        name = found[0].get("id") if isinstance(found, list) and found and isinstance(found[0], dict) else None
        if not isinstance(name, str):
            raise RequestError(f"{self.url}/v1/models: expected the name of a model, found {show(found)}")
        return name

    def _read_chat_prompt(self, prompt: ComparedPrompt, given: Any) -> tuple[list[int] | None, int | None]:
        """How the server has read a chat: its tokens if it can tell them, else their number."""
        ids = given.get("prompt_token_ids")
        if not is_id_list(ids):
            ids = self._tokenize({"messages": prompt.messages, "add_generation_prompt": True})
        return ids, len(ids) if ids else count_used(given)

    def _read_text(self, text: str) -> tuple[list[int] | None, int | None]:
        ids = self._tokenize({"prompt": text})
        if ids:
            return ids, len(ids)
        body = {"model": self.model, "prompt": text, "max_tokens": 1}
        return None, count_used(self._ask("/v1/completions", body))

    def _tokenize(self, body: Mapping[str, Any]) -> list[int] | None:
        """The server's own reading; None where it has no such path."""
        told = self._post("/tokenize", {"model": self.model, **body})
        try:
            found = told.json().get("tokens") if told.status_code == 200 else None
        except (ValueError, AttributeError):
            return None
        return found if is_id_list(found) else None


def is_id_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_integer, value))


def count_used(given: Any) -> int | None:
    """The prompt's tokens, as `usage` counts them."""
    usage = given.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if is_integer(count) else None


def find_reason_told(told: httpx.Response) -> str:
    """What a server says of an error, short."""
    try:
        found = told.json()
        error = found.get("error", found)
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = told.text
    return escape(" ".join(str(text).split())[:200]) or "no reason told"


def has_port(parts: SplitResult) -> bool:
    """Whether the port is one, if there is any: sockets would take 99999 as 34463."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False
