"""`saccade serve` with the bundled model, in a process of its own: answers, streams, lost clients, ends."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from commands import Run
from served_model import ANSWER, PROGRAM, QUESTION, ServedModel, read_events, serving

from saccade.api.llm import LLM
from saccade.engine.params import SamplingParams
from saccade.look.selected import list_selected
from saccade.server.run import describe_ending

LONG = {"prompt": QUESTION, "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[ServedModel]:
    with serving("--cache-tokens", "8192", "--speculate", "2") as served:
        yield served
        engine = served.find_engine()
        served.process.kill()
        for _ in range(200):  # the engine ends with it
            if not os.path.exists(f"/proc/{engine}"):
                return
            time.sleep(0.05)
        raise AssertionError("the engine's process is still there")


def test_a_completion_whole_and_in_events(server: ServedModel) -> None:
    body = {"prompt": QUESTION, "max_tokens": 40, "logprobs": 1}
    whole = server.post("/v1/completions", body).json()
    choice, usage = whole["choices"][0], whole["usage"]
    assert (choice["text"], choice["finish_reason"], whole["model"]) == (ANSWER, "stop", "saccade-bundled")
    assert (
        "".join(choice["logprobs"]["tokens"]) == ANSWER + "<|end|>" and max(choice["logprobs"]["token_logprobs"]) <= 0
    )
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [1] * 13
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (20, 13, 33)
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    told = server.post("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    assert told.headers["content-type"].startswith("text/event-stream")
    *events, last, done = read_events(told.text)
    pieces = [json.loads(event)["choices"][0] for event in events]
    assert done == "[DONE]" and "".join(piece["text"] for piece in pieces) == ANSWER
    assert sum((piece["logprobs"]["token_logprobs"] for piece in pieces), []) == choice["logprobs"]["token_logprobs"]
    offsets = sum((piece["logprobs"]["text_offset"] for piece in pieces), [])
    assert offsets == choice["logprobs"]["text_offset"]
    assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == ["stop"]
    assert json.loads(last)["usage"]["completion_tokens"] == 13


def test_several_prompts_and_answers_repeat_with_their_seed(server: ServedModel) -> None:
    tokens = server.post("/tokenize", {"prompt": QUESTION}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == QUESTION
    body = {"prompt": [tokens, tokens[:9]], "n": 2, "max_tokens": 12, "temperature": 1.5, "seed": 5}
    texts = [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]]
    assert texts == [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]]
    assert len(texts) == 4 and texts[2] != texts[3]
    second = server.post("/v1/completions", body | {"prompt": tokens[:9], "n": 1, "seed": 6}).json()
    assert second["choices"][0]["text"] == texts[3]
    assert server.post("/v1/completions", {"prompt": QUESTION, "stop": "=", "echo": True}).json()["choices"][0][
        "text"
    ] == (QUESTION + "\n12 + 7 ")


def test_where_an_answer_looked(server: ServedModel) -> None:
    """Of either API, whole and as the last event, and with drafts: what the model selects without them."""
    llm = LLM(mtp=False)
    text = "The gate code of Irene is 54. The door of Sam is red. The dog sleeps. What is the gate code of Irene?"
    tokens = llm.encode(text)
    made = llm.generate([tokens], SamplingParams(temperature=0.0, max_tokens=24), capture_selection=True)[0]
    wanted = list_selected(made.selections or (), len(tokens), len(made.token_ids))
    asked = {"max_tokens": 24, "temperature": 0, "saccade": {"selection": True}}
    body = asked | {"prompt": tokens}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    look = choice["saccade"]
    assert (look["selected"], len(look["prompt"])) == (wanted, len(tokens))
    assert "".join(look["answer"]).removesuffix("<|end|>") == choice["text"]
    *_, last, done = read_events(server.post("/v1/completions", body | {"stream": True}).text)
    assert done == "[DONE]" and json.loads(last)["choices"][0]["saccade"] == look
    chat = asked | {"messages": [{"role": "user", "content": text}]}
    (choice,) = server.post("/v1/chat/completions", chat).json()["choices"]
    told = choice["saccade"]
    assert "".join(told["answer"]).startswith(choice["message"]["content"])
    assert len(told["selected"]) == len(told["answer"]) and {len(layers) for layers in told["selected"]} == {4}
    *_, last, done = read_events(server.post("/v1/chat/completions", chat | {"stream": True}).text)
    assert json.loads(last)["choices"][0]["saccade"] == told
    assert "saccade" not in server.post("/v1/completions", {"prompt": tokens}).json()["choices"][0]
    (choice,) = server.post("/v1/completions", body | {"return_token_ids": True}).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (made.token_ids, tokens)
    *events, _ = read_events(server.post("/v1/completions", body | {"return_token_ids": True, "stream": True}).text)
    assert sum((json.loads(event)["choices"][0]["token_ids"] for event in events), []) == made.token_ids


def test_a_client_that_goes_away_frees_its_pages(server: ServedModel) -> None:
    with server.client.stream("POST", "/v1/completions", json=LONG) as told:
        lines = told.iter_lines()  # dropped, it would close the connection
        next(lines)
        server.wait_for("saccade_requests_running", 1)  # what the engine says of itself may come behind the first token
        assert server.measure("saccade_cache_pages_used") > 0
    server.wait_for("saccade_requests_running", 0)
    assert server.measure("saccade_cache_pages_used") == 0
    assert server.measure('saccade_answers_total{reason="cancelled"}') == 1  # and was not answered to its end
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=LONG | {"stream": False}, timeout=httpx.Timeout(60, read=0.5))
    server.wait_for("saccade_requests_running", 0)


def test_a_prompt_that_comes_again_is_found(server: ServedModel) -> None:
    tokens = server.post("/tokenize", {"prompt": QUESTION * 8}).json()["tokens"]
    cached = []
    for _ in range(2):
        usage = server.post("/v1/completions", {"prompt": tokens, "max_tokens": 1}).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert len(tokens) > 128 and cached == [0, 128]
    assert (
        server.measure("saccade_prefix_hit_tokens_total") == server.measure("saccade_cached_prompt_tokens_total") == 128
    )


def test_the_engine_refuses_what_it_cannot_serve(server: ServedModel) -> None:
    for body, status, word in (
        ({"prompt": QUESTION, "max_tokens": 5000}, 400, "max_tokens: 20 prompt tokens and 5000 new ones make 5020"),
        ({"prompt": [1, 99999]}, 400, "token 99999 at place 1"),
        ({"prompt": [1] * 5000, "stream": True}, 400, "5,000"),
        ({"prompt": QUESTION, "guided_grammar": "root ::= root"}, 400, "grammar"),  # compiles, and allows nothing
    ):
        told = server.post("/v1/completions", body)
        assert (told.status_code, word in told.json()["error"]["message"]) == (status, True), told.text
    assert server.client.get("/health").json() == {"status": "ok"}


def test_a_broken_request_is_told_in_json(server: ServedModel) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, 5) as line:
        line.sendall(b"NONSENSE\r\n\r\n")
        head, _, body = line.recv(4096).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["type"] == "invalid_request_error"


def refuse_while_ending(served: ServedModel) -> None:
    """Probes hear that a server is ending, and clients of each API that they should try again elsewhere."""
    for _ in range(100):
        health = served.client.get("/health")
        if health.status_code != 200:
            break
        time.sleep(0.02)
    assert (health.status_code, health.json()) == (503, {"status": "ending"})
    asked = {"prompt": QUESTION, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages"):
        told = served.post(path, asked)
        assert (told.status_code, told.headers["retry-after"]) == (503, "10")
        assert told.json()["error"]["message"] == "the server is ending"
    assert told.json()["type"] == "error"


def test_TERM_ends_a_server_once_its_last_answer_is_read() -> None:
    with serving("--cache-tokens", "8192", "--grace", "60") as served:
        with served.client.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 60}) as told:
            lines = told.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            refuse_while_ending(served)
            assert read_events("\n".join(lines))[-1] == "[DONE]"
        assert served.process.wait(10) == 0, served.read_log()


def test_TERM_lets_answers_finish_and_a_second_one_cuts_them() -> None:
    with serving("--cache-tokens", "8192", "--grace", "60") as served:
        engine = served.find_engine()
        short = LONG | {"max_tokens": 20}
        with served.client.stream("POST", "/v1/completions", json=LONG) as long:
            with served.client.stream("POST", "/v1/completions", json=short) as told:
                lines, others = told.iter_lines(), long.iter_lines()
                next(lines), next(others)
                served.process.send_signal(signal.SIGTERM)
                refuse_while_ending(served)
                events = read_events("\n".join(lines))
            assert events[-1] == "[DONE]" and json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
            served.process.send_signal(signal.SIGTERM)
            *_, error, done = read_events("\n".join(others))
            assert done == "[DONE]" and "told twice" in json.loads(error)["error"]["message"]
        assert served.process.wait(10) == 0, served.read_log()
        assert not os.path.exists(f"/proc/{engine}")


def test_an_engine_that_dies_turns_health_red_and_ends_every_answer() -> None:
    with serving(program=PROGRAM) as served:
        with served.client.stream("POST", "/v1/completions", json=LONG) as told:
            lines = told.iter_lines()
            next(lines)
            os.kill(served.find_engine(), signal.SIGKILL)
            *_, error, done = read_events("\n".join(lines))
        assert done == "[DONE]" and json.loads(error)["error"]["type"] == "server_error"
        assert "SIGKILL" in json.loads(error)["error"]["message"]
        health = served.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert served.post("/v1/completions", {"prompt": QUESTION}).status_code == 503
        assert served.measure("saccade_engine_up") == 0
        assert served.process.wait(10) == 1


def test_the_end_is_told_in_words_that_fit() -> None:
    assert describe_ending(0, 30.0) == "ending: no answer is open"
    assert describe_ending(1, 30.0) == "ending: 1 open answer, 30 seconds to finish"
    assert describe_ending(2, 0.5) == "ending: 2 open answers, 0.5 seconds to finish"


def test_what_cannot_be_served_is_one_line(run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    for options, text in (
        (["--port", "70000"], "port: expected an integer from 0"),
        (["--host", "192.0.2.1"], "cannot serve at 192.0.2.1 port 8000"),
        (["--api-key", " "], "api_keys: expected texts that are not empty"),
        (["no/such/model"], "no/such/model"),
        (["--chat-template", str(broken)], "--chat-template: no template that jinja2 reads: line 1"),
    ):
        ran = run("serve", *options)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1) and text in ran.err, ran
