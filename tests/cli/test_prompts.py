"""Prompts and token ids from files and standard input, and many of them as JSON lines."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from commands import Run

from saccade.api.llm import LLM
from saccade.cli.many import answer
from saccade.cli.many.asked import SHOWN_LINES, parse_line, read_asked
from saccade.cli.prompts import parse_tokens, read_text
from saccade.engine.engine import Engine
from saccade.engine.params import SamplingParams
from saccade.errors import LoadError, RequestError

SHORT = ["--max-tokens", "3", "--temperature", "0", "--device", "cpu"]


def give(monkeypatch: pytest.MonkeyPatch, data: bytes | None) -> None:
    monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data)))


def test_a_prompt_is_the_same_from_everywhere(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompt.txt"
    as_argument = run("generate", "--prompt", "Löok", *SHORT).out
    for data in ("Löok", "Löok\n", "Löok\r\n", "\ufeffLöok\n"):
        path.write_bytes(data.encode())
        assert run("generate", "--prompt-file", path, *SHORT).out == as_argument
    give(monkeypatch, b"L\xc3\xb6ok\n")
    assert run("generate", "--prompt-file", "-", *SHORT).out == as_argument
    assert read_text(str(path), "--prompt-file") == "Löok"
    path.write_bytes(b"a\r\n\n")
    assert read_text(str(path), "--prompt-file") == "a\r\n"  # one line break


def test_score_takes_text_and_token_ids_from_everywhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("Tom has\n")
    data = json.loads(run("score", "--text", "Tom has", "--json").out)
    ids = data["token_ids"]
    assert len(ids) > 2 and len(data["logprobs"]) == len(ids) - 1
    (tmp_path / "ids").write_text(json.dumps(ids, indent=1) + "\n")
    give(monkeypatch, "\n".join(map(str, ids)).encode())
    for line in (["--tokens", ", ".join(map(str, ids))], ["--tokens-file", tmp_path / "ids"], ["--tokens-file", "-"],
                 ["--prompt-file", tmp_path / "text"]):  # fmt: skip
        assert json.loads(run("score", *line, "--json").out) == data, line
    for text in ("1,,2", "", "[]", "1;2", "1.5", "[1, 2", "0x1"):
        with pytest.raises(RequestError, match="--tokens: expected token ids like 1,2,3"):
            parse_tokens(text, "--tokens")


UNREADABLE: dict[str, tuple[list[str], bytes | None, str]] = {  # command line, standard input, what is said
    "nothing": (["generate"], b"", "expected one of --prompt TEXT, --prompt-file FILE and --input FILE, found none"),
    "two": (["generate", "--prompt", "a", "--prompt-file", "b"], b"", "found --prompt TEXT and --prompt-file FILE"),
    "two of score": (["score", "--tokens", "1", "--text", "b"], b"", "found --tokens IDS and --text TEXT"),
    "no such file": (["generate", "--prompt-file", "nowhere"], b"", "nowhere cannot be read: No such file"),
    "a folder": (["score", "--prompt-file", "."], b"", ". cannot be read: Is a directory"),
    "no name": (["generate", "--prompt-file", ""], b"", "an empty name cannot be read"),
    "a NUL in a name": (["generate", "--prompt-file", "a\0b"], b"", "cannot be read: embedded null byte"),
    "an empty stdin": (["generate", "--prompt-file", "-"], b"", "standard input is empty; expected text"),
    "one line break": (["generate", "--prompt-file", "-"], b"\n", "standard input is empty; expected text"),
    "a closed stdin": (["generate", "--prompt-file", "-"], None, "standard input is closed"),
    "no UTF-8": (["generate", "--prompt-file", "-"], b"ab\xff", "byte 2 of standard input is no text in UTF-8"),
    "no end": (["generate", "--prompt-file", "/dev/zero"], b"", "/dev/zero is longer than 67,108,864 bytes"),
    "no ids": (["score", "--tokens-file", "-"], b"1 x", "--tokens-file: expected token ids like 1,2,3, found '1 x'"),
    "output alone": (["generate", "--prompt", "a", "--output", "x"], b"", "--output is for --input"),
    "looked at": (["generate", "--input", "-", "--looked-at", "2"], b"", "--json and --looked-at are for one prompt"),
    "no lines": (["generate", "--input", "-"], b"\n \n", "standard input holds no line"),
    "no place": (["generate", "--input", "-", "--output", "nowhere/x"], b"{}", "found no such directory: nowhere/x"),
    "a place that is a folder": (["generate", "--input", "-", "--output", "."], b"{}", "found a directory: ."),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_one_line_before_a_model_is_loaded(
    run: Run, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line, data, message = UNREADABLE[case]
    monkeypatch.chdir(tmp_path)
    give(monkeypatch, data)
    ran = run(*line)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1) and message in ran.err, ran.err
    assert ran.err.startswith("saccade: ") and list(tmp_path.iterdir()) == []


WRONG = {
    b'{"prompt": 3}': "prompt: expected a text, found 3",
    b'{"prompt": ""}': "prompt: expected a text, found ''",
    b'{"promt": "a"}': "unknown key 'promt'; did you mean prompt?",
    b'{"prompt": "a", "suffix": "b"}': "unknown key 'suffix'; known: prompt, token_ids, id, max_tokens",
    b'{"prompt": "a", "prompt": "b"}': "'prompt' is there twice",
    b'{"prompt": "a", "token_ids": [1]}': 'expected "prompt" or "token_ids", found both',
    b"{}": 'expected "prompt" or "token_ids", found none',
    b'{"token_ids": []}': "token_ids: expected a list of integers",
    b'{"token_ids": [1, true]}': "token_ids: expected a list of integers",
    b'{"token_ids": "1,2"}': "token_ids: expected a list of integers",
    b'{"prompt": "a", "id": []}': "id: expected a text or an integer",
    b'{"prompt": "a", "temperature": -1}': "temperature: expected a finite number of at least 0",
    b'{"prompt": "a", "top_p": NaN}': "NaN is no JSON",
    b'{"prompt": "a", "max_tokens": 1e3}': "max_tokens: expected an integer",
    b'{"prompt": "a", "stop": [1]}': "stop: expected strings",
    b'["a"]': "expected a JSON object",
    b'"a"': "expected a JSON object",
    b'{"prompt": "a"': "is no JSON object",
    b'{"prompt": "\xff"}': "is no JSON object: 'utf-8'",
    b"[" * 100_000: "is nested too deeply",
    b'{"seed": ' + b"9" * 5000 + b"}": "is no JSON object: Exceeds the limit",
}


@pytest.mark.parametrize("line", WRONG, ids=range(len(WRONG)))
def test_a_wrong_line_is_named_for_what_is_wrong(line: bytes) -> None:
    with pytest.raises(RequestError) as error:
        parse_line(1, line, SamplingParams())
    assert str(error.value).startswith(WRONG[line]) and len(str(error.value)) < 300


def test_a_line_says_what_differs_from_the_options(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b", "top_k": 2, "seed": null}\r\n\n{"token_ids": [1], "id": 7}'.encode())
    first, second = read_asked(str(path), SamplingParams(seed=5, top_k=1))
    assert (first.number, first.prompt, first.params) == (1, "a\u2028b", SamplingParams(seed=5, top_k=2))
    assert (second.number, second.prompt, second.id) == (3, [1], 7)
    path.write_text("{}\n" * (SHOWN_LINES + 5))
    with pytest.raises(RequestError, match=r"15 lines cannot be served(.|\n)*line 10: .*\n  and 5 more$"):
        read_asked(str(path), SamplingParams())


LINES = [
    {"prompt": "Tom has 12 apples. He buys 7 more. How many apples does Tom have?", "id": "apples"},
    {"token_ids": [1, 2, 3], "max_tokens": 2, "logprobs": 1},
    {"prompt": "Tom", "max_tokens": 30},
    {"prompt": "Look", "max_tokens": 1, "id": 7},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(map(json.dumps, LINES)))
    return path


def test_many_prompts_are_answered_in_order_and_go_on_after_ctrl_c(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source.with_name("out.jsonl")
    line = ["generate", "--input", source, "--temperature", "0", "--dtype", "float32", "--device", "cpu"]
    whole = run(*line).out  # on stdout
    data = [json.loads(text) for text in whole.splitlines()]
    assert [(one["line"], one.get("id")) for one in data] == [(1, "apples"), (3, None), (5, None), (7, 7)]
    assert data[0]["text"].endswith("#### 19") and [len(one["token_ids"]) for one in data[1:]] == [2, 30, 1]
    assert [choice["token"] for choice in data[1]["logprobs"]] == data[1]["token_ids"] and "logprobs" not in data[0]
    ran = run("generate", "--prompt", "Look", "--max-tokens", "1", "--temperature", "0", "--json")
    assert json.loads(ran.out)["token_ids"] == data[3]["token_ids"]

    step, steps = Engine.step, 0

    def interrupt(engine: Engine) -> object:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupt)
        ran = run(*line, "--output", out)
    kept = f"{out} holds them, and the same command goes on behind them"
    assert (ran.code, ran.err.splitlines()[-1]) == (130, f"saccade: interrupted after 2 of 4 lines; {kept}")
    assert whole.startswith(out.read_text()) and out.read_text().count("\n") == 2
    with out.open("a") as f:
        f.write(whole.splitlines()[2][:40])  # killed in the middle of a line
    ran = run(*line, "--output", out)
    assert ran.code == 0 and ran.err.startswith(f"{out} holds the answers to 2 of 4 lines; going on behind them\n")
    assert out.read_text() == whole
    ran = run(*line, "--output", out)
    assert (ran.code, ran.err) == (0, f"{out} holds the answers to all 4 lines already\n")


def test_nothing_is_overwritten_and_nothing_is_left_by_a_refusal(run: Run, source: Path) -> None:
    out = source.with_name("out.jsonl")
    answer = json.dumps({"line": 1, "input": read_asked(str(source), SamplingParams())[0].digest, "text": ""})
    for held in ("notes", "notes\n", '{"line": 1}\n', answer + "\n" + answer, answer.replace("1", "2", 1) + "\n"):
        out.write_text(held)
        ran = run("generate", "--input", source, "--output", out)
        assert (ran.code, out.read_text()) == (2, held) and "nothing is overwritten: name another file" in ran.err
    before = source.read_text()
    ran = run("generate", "--input", source, "--output", source)
    assert (ran.code, source.read_text()) == (2, before) and "the file of --input, which would be lost" in ran.err
    out.unlink()
    ran = run("generate", "nowhere", "--input", source, "--output", out)
    assert ran.code == 2 and "no such directory" in ran.err and not out.exists()
    source.write_text('{"prompt": "a"}\n{"token_ids": [9999]}\n{"prompt": "\\ud800"}\n{"token_ids": [-1]}\n')
    ran = run("generate", "--input", source, "--output", out)
    text = "3 lines cannot be served, so nothing was run:\n  line 2: token 9999 .*\n  line 3: .*\n  line 4: token -1 "
    assert ran.code == 2 and not out.exists()
    assert re.search(text, ran.err), ran.err


def test_an_output_that_takes_no_more_is_named(run: Run, source: Path) -> None:
    ran = run("generate", "--input", source, "--output", "/dev/full", *SHORT)
    assert ran.code == 2 and ran.err.endswith(
        "saccade: --output: /dev/full cannot be written: No space left on device\n"
    )


def test_lines_are_judged_before_weights_are_loaded(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(LLM, "of", refuse)
    long = {"token_ids": [5] * 5000}
    lines = [{"prompt": "a"}, {"token_ids": [9999]}, long, {"prompt": "a", "max_tokens": 5000}, {"prompt": "\ud800"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = run("generate", "--input", source)
    told = ran.err.splitlines()
    assert ran.code == 2 and [line.split(":")[0] for line in told[-4:]] == [f"  line {n}" for n in (2, 3, 4, 5)]
    assert "4 lines cannot be served, so nothing was run" in told[-5]


def test_a_request_that_fails_does_not_stop_the_others(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = answer.collect_pieces

    def fail(stream: object) -> object:
        if len(calls) == 1:
            calls.append(stream)
            raise LoadError("the logits are not finite")
        calls.append(stream)
        return collect(stream)  # type: ignore[arg-type]

    calls: list[object] = []
    monkeypatch.setattr(answer, "collect_pieces", fail)
    ran = run("generate", "--input", source, *SHORT)
    data = [json.loads(text) for text in ran.out.splitlines()]
    assert ran.code == 1 and "1 line ended in an error" in ran.err
    assert [one.get("error") for one in data] == [None, "the logits are not finite", None, None]
