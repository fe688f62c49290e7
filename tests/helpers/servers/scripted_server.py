"""A server whose model says what is written here: `python scripted_server.py`. It tells its address as `saccade serve`.

The words are those that a model of DeepSeek-V3.2 would say to the scenarios of canitoolcall's probe.
"""

import asyncio
import json
import socket
import sys
from typing import Any

import uvicorn
from scripted_engine import ScriptedEngine, make_service, say_text

from saccade.engine.params import SamplingParams
from saccade.server.app import make_app
from saccade.server.connections import make_protocol
from saccade.server.engine.wire import Delta

BLOCK = "<｜DSML｜function_calls>\n{}\n</｜DSML｜function_calls>"
INVOKE = '<｜DSML｜invoke name="{}">\n{}\n</｜DSML｜invoke>'
PARAMETER = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>'
EVENT = {
    "title": "Design review",
    "start": "2026-10-01T15:00:00Z",
    "attendees": [{"name": "Ana", "email": "ana@example.com"}, {"name": "Bo", "email": "bo@example.com"}],
    "location": {"city": "Berlin", "room": "4.12"},
}
NOTE = {"title": "Grüße aus Zürich", "body": "Café ☕ in 東京 — naïve résumé 🚀"}


def write_parameters(arguments: dict[str, Any]) -> str:
    lines = []
    for name, value in arguments.items():
        is_text = isinstance(value, str)
        lines.append(PARAMETER.format(name, str(is_text).lower(), value if is_text else json.dumps(value)))
    return "\n".join(lines)


def write_calls(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n\n" + BLOCK.format("\n".join(INVOKE.format(name, write_parameters(given)) for name, given in calls))


PARIS, TOKYO = ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Tokyo"})
# What stands in the prompt, and what is said to it; the first that fits counts.
LINES = (
    ("temp_c", "It is 18 degrees and clear in Paris."),
    ("Lisbon", write_calls(("get_weather", {"city": "Lisbon"}))),
    ("in Paris and in Tokyo", "Both." + write_calls(PARIS, TOKYO)),
    ("weather in Paris right now", write_calls(PARIS)),
    ("What is 17 + 25?", "42"),
    ("Create an event", write_calls(("create_event", EVENT))),
    ("Save a note titled", write_calls(("save_note", NOTE))),
    ("on the server? Use the tool", write_calls(("get_server_time", {}))),
    ("9.11 or 9.9", "<think>9.9 is larger.</think>\n\n" + write_calls(("record_answer", {"answer": "9.9"}))),
)


def main(size: int = 3) -> None:
    def script(tokens: list[int], params: SamplingParams) -> list[Delta]:
        prompt = b"".join(service.spell(token) for token in tokens).decode(errors="replace")
        text = next((text for words, text in LINES if words in prompt), "Hello!")
        return say_text(text, size, "stop")

    service = make_service(ScriptedEngine(script))
    config = uvicorn.Config(make_app(service), http=make_protocol(10), log_level="warning", lifespan="off", ws="none")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"serving scripted at http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
