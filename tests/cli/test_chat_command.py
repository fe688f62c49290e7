"""`saccade chat`: lines in, answers out; dim thinking and Ctrl-C on a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from saccade.chat.answer import ChatAnswer
from saccade.chat.types import CallDelta, ChatOptions, ContentDelta, ReasoningDelta
from saccade.cli import chat
from saccade.cli.chat import Conversation, Screen, describe_speed, talk
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError

APPLES = "Tom has 12 apples. He buys 7 more. How many apples does Tom have?"


def test_lines_of_a_pipe_are_questions(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = tmp_path / "facts.txt"
    facts.write_text("The hotel password of David is fox moon star.")
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"{APPLES}\n\n/help\nWhat is the hotel password of David?\n/exit\nnot read\n")
    )
    ran = run("chat", "--system-file", facts, "--device", "cpu", "--cache-tokens", "1024")
    assert ran.code == 0 and ran.out.count("####") == 2 and ran.out.endswith("#### fox moon star\n")
    assert "\x1b" not in ran.out and "/new forgets" in ran.err
    assert ran.err.count(" tokens/s; the first after ") == 2


def test_what_cannot_be_is_one_line_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "t.jinja"
    broken.write_text("{% if %}")
    for options, text in (
        (
            ["--chat-template", broken],
            "saccade: --chat-template: no template that jinja2 reads: line 1: Expected an expression, got 'end of statement block'\n",
        ),
        (
            ["--chat-template", tmp_path / "no.jinja"],
            f"saccade: --chat-template: {tmp_path}/no.jinja cannot be read: No such file or directory\n",
        ),
        (
            ["--system", "a", "--system-file", "b"],
            "saccade: chat: --system and --system-file are one option; expected one of them, found both\n",
        ),
        (["--temperature", "-1"], "saccade: temperature: expected a finite number of at least 0, found -1.0\n"),
    ):
        assert run("chat", *options) == (2, "", text)


class FakeStream:
    """An answer that is known, and a Ctrl-C in the middle of it if asked for."""

    def __init__(self, deltas: list[Any], stops_at: int) -> None:
        self.answer, self.prompt_token_ids, self.is_closed = ChatAnswer(), [1, 2, 3], False
        self._deltas, self._stops_at = deltas, stops_at

    def __iter__(self) -> Iterator[Any]:
        for place, delta in enumerate(self._deltas):
            if place == self._stops_at:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)  # which the signal ends
            self.answer.add([delta])
            yield type("Piece", (), {"deltas": [delta], "token_ids": [7], "finish_reason": None})
        yield type("Piece", (), {"deltas": [], "token_ids": [8], "finish_reason": "stop"})

    def close(self) -> None:
        self.is_closed = True


class FakeLLM:
    def __init__(self, stops_at: int = -1) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.stops_at, self.streams = stops_at, list[FakeStream]()

    def stream_chat(self, messages: list[dict[str, Any]], params: Any, options: Any) -> FakeStream:
        self.asked.append(messages)
        deltas = [
            ReasoningDelta("let me"),
            ReasoningDelta(" see"),
            ContentDelta("It is"),
            ContentDelta(" so."),
            CallDelta(0, "c", "f", "{}"),
        ]
        self.streams.append(FakeStream(deltas, self.stops_at))
        return self.streams[-1]


def converse(lines: str, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    talk(Conversation(llm, "Be short.", SamplingParams(), ChatOptions()))  # type: ignore[arg-type]
    return llm.asked


def test_the_conversation_is_kept_until_it_is_to_be_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = converse("one\ntwo\n/new\nthree\n", FakeLLM(), monkeypatch)
    system, one = {"role": "system", "content": "Be short."}, {"role": "user", "content": "one"}
    assert asked[0] == [system, one]
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][2]["content"] == "It is so." and asked[1][2]["reasoning_content"] == "let me see"
    assert asked[2] == [system, {"role": "user", "content": "three"}]
    assert capsys.readouterr().out.startswith("let me see\nIt is so.f({})\n")


def test_a_mistyped_command_is_no_question(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for typed, told in (
        ("/nwe", "there is no /nwe; expected /new, or"),
        ("/ex it", "no /ex; expected /exit, or"),
        ("/bogus", "no /bogus; expected /new or /exit or /quit or /help or /?, or a space before a question"),
    ):
        llm = FakeLLM()
        with pytest.raises(RequestError, match=re.escape(told)):
            converse(f"{typed}\n", llm, monkeypatch)
        assert not llm.asked
    asked = converse(" /bogus\n/etc/hosts is what?\n/quit\nno\n", FakeLLM(), monkeypatch)
    assert [messages[-1]["content"] for messages in asked] == ["/bogus", "/etc/hosts is what?"]
    assert "no /" not in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # with and without a locale
def test_a_line_that_is_no_text_is_told_by_its_number(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    llm = FakeLLM()
    raw = io.BytesIO(b"\xef\xbb\xbfone\ncaf\xe9\nthree\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8", errors=errors))
    with pytest.raises(RequestError, match="standard input: byte 3 of line 2 is no text in UTF-8"):
        talk(Conversation(llm, "", SamplingParams(), ChatOptions()))  # type: ignore[arg-type]
    assert [messages[-1]["content"] for messages in llm.asked] == ["one"]


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM(stops_at=3)
    asked = converse("one\ntwo\n", llm, monkeypatch)
    assert [stream.is_closed for stream in llm.streams] == [True, True]
    assert asked[1][2] == {"role": "assistant", "content": "It is", "reasoning_content": "let me see"}
    out, err = capsys.readouterr()
    assert out == "let me see\nIt is\n" * 2 and err.count("; interrupted\n") == 2


def test_thinking_is_dim_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for has_color, expected in ((True, "\x1b[2mhm\x1b[22m\nyes\n"), (False, "hm\nyes\n")):
        shown = Screen(has_color)
        shown.show("hm", is_dim=True)
        shown.show("yes")
        shown.end()
        assert capsys.readouterr().out == expected


def test_speed_is_of_the_tokens_behind_the_first() -> None:
    assert (
        describe_speed(43, 1310, 0.5, 2.0, "stop")
        == "43 tokens, 21.0 tokens/s; the first after 0.50 s, behind 1,310 of the prompt"
    )
    assert describe_speed(1, 3, 0.5, 0.0, "length") == "1 token; the first after 0.50 s, behind 3 of the prompt; length"
    assert describe_speed(0, 3, 0.0, 0.0, "interrupted") == "no answer: interrupted"


def test_a_terminal_ends_an_answer_and_then_the_chat() -> None:
    """With a real terminal and real signals."""
    main, end = pty.openpty()
    line = [sys.executable, "-m", "saccade", "chat", "--device", "cpu", "--cache-tokens", "1024", "--threads", "1"]
    process = subprocess.Popen(line, stdin=end, stdout=end, stderr=end, start_new_session=True, close_fds=True)
    os.close(end)
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        stop = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < stop and process.poll() is None, seen
            if select.select([main], [], [], 0.2)[0]:
                seen += os.read(main, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]

    try:
        read_until("ends the answer, and again the chat")
        read_until("> ")
        os.write(main, f"{APPLES}\n".encode())
        read_until("12 + ")
        process.send_signal(signal.SIGINT)
        read_until("; interrupted")
        read_until("> ")
        time.sleep(0.5)  # readline shows the prompt before it waits: a signal in between is heard at the next key
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        os.close(main)
    assert chat.HELP
