"""What /metrics counts: prompts that were taken, once each; answers by how they ended; drafts and what was found."""

import asyncio
from typing import Any

import httpx
from api_client import Client
from scripted_engine import ScriptedEngine, make_service, say_text

from saccade.engine.params import SamplingParams
from saccade.server.app import make_app
from saccade.server.engine.wire import Counts, Delta

FOUND = 3  # tokens of each prompt, in the cache


def answer(tokens: list[int], params: SamplingParams) -> list[Delta]:
    """Two steps: one token, then two. A seed of 9 fails in the second; one of 8 has no token at all."""
    pieces = [piece._replace(counts=Counts(FOUND)) for piece in say_text("abcd", size=2)]
    if params.seed == 9:
        return [pieces[0], Delta([], "", error="not finite", error_kind="not_finite", counts=Counts(FOUND))]
    if params.seed == 8:
        return [Delta([], "", error="no token is left", error_kind="no_answer", counts=Counts(FOUND))]
    return [pieces[0], pieces[1]._replace(tokens=[0, 0], counts=Counts(FOUND, 4, 1))]


def test_counts_are_of_what_was_taken() -> None:
    engine = ScriptedEngine(answer)
    service = make_service(engine)

    def measure(name: str) -> float:
        return service.metrics.registry.get_sample_value(f"saccade_{name}") or 0.0

    def count_ends() -> dict[str, float]:
        reasons = ("stop", "error", "refused", "cancelled", "no_answer")
        samples = (
            (r, service.metrics.registry.get_sample_value("saccade_answers_total", {"reason": r})) for r in reasons
        )
        return {reason: count for reason, count in samples if count}

    async def run() -> None:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:

            async def ask(**body: Any) -> httpx.Response:
                return await client.post("/v1/completions", json={"prompt": [5] * 10, **body})

            usage = (await ask(n=3)).json()["usage"]
            assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (10, FOUND)
            assert (measure("prompt_tokens_total"), measure("cached_prompt_tokens_total")) == (10, FOUND)
            assert (measure("generation_tokens_total"), count_ends()) == (9, {"stop": 3})
            assert measure("time_to_first_token_seconds_count") == 3
            assert measure("time_between_tokens_seconds_count") == 6  # of tokens, not of pieces

            usage = (await ask(prompt=[[5] * 10, [5] * 10], n=2, stream=False)).json()["usage"]
            assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (20, 2 * FOUND)
            assert (measure("prompt_tokens_total"), measure("cached_prompt_tokens_total")) == (30, 3 * FOUND)

            assert (await ask(max_tokens=9000)).status_code == 400  # refused by the engine: nothing was taken
            assert measure("prompt_tokens_total") == 30 and count_ends() == {"stop": 7, "refused": 1}
            assert measure("request_seconds_count") == 7

            assert (await ask(seed=9)).status_code == 500
            assert count_ends() == {"stop": 7, "refused": 1, "error": 1} and measure("prompt_tokens_total") == 40

            assert (await ask(seed=8)).status_code == 400  # the request's fault, and no alarm
            assert count_ends() == {"stop": 7, "refused": 1, "error": 1, "no_answer": 1}

            engine.pause = 0.2
            asked = asyncio.create_task(ask())
            await asyncio.sleep(0.3)  # it has its first piece
            assert measure("answers_open") == 1
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert count_ends()["cancelled"] == 1 and measure("answers_open") == 0
            assert (measure("prompt_tokens_total"), measure("cached_prompt_tokens_total")) == (60, 6 * FOUND)

            engine.failure = "gone"
            assert (await ask()).status_code == 503
            assert count_ends()["error"] == 2 and measure("prompt_tokens_total") == 60
            assert measure("engine_up") == 0

    asyncio.run(run())


def test_requests_are_counted_by_paths_that_the_description_has_and_one_other() -> None:
    client = Client()

    def list_counted() -> set[str]:
        (family,) = client.metrics.requests.collect()
        return {sample.labels["path"] for sample in family.samples if sample.name.endswith("_total")}

    described = {path for path in client.app.openapi()["paths"] if "{" not in path}
    for path in (*described, "/", "/v1/models/own", "/openapi.json", "/nowhere"):
        client.send("GET", path)
    assert list_counted() == described | {"other"} and len(described) > 10
