"""A small server in the shape of OpenAI's API before a model in this process; shapes are those of other engines."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from saccade.api.llm import LLM
from saccade.chat.types import ChatOptions
from saccade.engine.params import SamplingParams

EXTENSIONS = ("return_token_ids", "return_tokens_as_token_ids", "echo")


class OtherEngine:
    """`shape`: "ids" tells ids, echoes and has /tokenize, as vLLM; "texts" tells texts only and refuses extensions;
    "bare" tells no log-probabilities; "html" is no API; "other" tells ids of another vocabulary."""

    def __init__(self, llm: LLM, shape: str) -> None:
        self.llm, self.shape, self.asked = llm, shape, list[tuple[str, Any]]()

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((path, body))
        if self.shape == "html":
            return 200, "<html>"
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served"}]}
        if path == "/tokenize" and self.shape != "texts":
            return 200, {"tokens": self.read(body)}
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return 404, {"error": {"message": "nothing here"}}
        if self.shape == "texts" and any(name in body for name in EXTENSIONS):
            return 400, {"error": {"message": "extra fields are not allowed"}}
        tokens = self.read(body)
        asked = SamplingParams(temperature=0.0, max_tokens=body["max_tokens"], logprobs=0, prompt_logprobs=0)
        made = self.llm.generate([tokens], asked)[0]
        rows = [(choice.token, choice.logprob) for choice in made.logprobs or ()]
        ids = [token + 10000 for token in made.token_ids] if self.shape == "other" else made.token_ids
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        if self.shape in ("ids", "other"):
            choice["token_ids"] = ids
        if self.shape != "bare" and "messages" in body:
            choice["logprobs"] = {"content": [{"token": self.spell(t), "logprob": p} for t, p in rows]}
        elif self.shape != "bare":
            if body.get("echo"):
                echoed = [choice.logprob for choice in made.prompt_logprobs or ()]
                rows = [*zip(tokens, [None, *echoed], strict=True), *rows]  # type: ignore[list-item]
            choice["logprobs"] = {"tokens": [self.spell(t) for t, _ in rows], "token_logprobs": [p for _, p in rows]}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(tokens)}}

    def read(self, body: Any) -> list[int]:
        prompt = body.get("prompt")
        if "messages" in body:
            assert self.llm.chat_format is not None and self.llm.tokenizer is not None
            return self.llm.tokenizer.encode_rendered(self.llm.chat_format.render(body["messages"], (), ChatOptions()))
        return self.llm.encode(prompt)

    def spell(self, token: int) -> str:
        assert self.llm.tokenizer is not None
        return self.llm.tokenizer.decode_whole([token])


@contextmanager
def answering(engine: OtherEngine) -> Iterator[str]:
    """Its address, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, body: Any) -> None:
            status, value = engine.reply(self.path, body)
            raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
