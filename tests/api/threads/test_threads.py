"""One LLM and many threads: each gets the answer that it gets alone, nobody waits for another's, nothing stays behind."""

import asyncio
import gc
import json
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, get_ident, main_thread
from typing import Any

import pytest
import torch
from byte_tokenizer import SPECIAL, build_encoder
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_dict, tiny_tensors

from saccade.api.llm import LLM
from saccade.api.outputs import Stream
from saccade.engine.params import SamplingParams
from saccade.errors import LoadError, MemoryRefusedError, RequestError

LIMIT = 60  # seconds until a test that hangs fails
VALUES = tiny_dict(vocab_size=264, num_hidden_layers=1, max_position_embeddings=512, eos_token_id=SPECIAL)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
HOT = SamplingParams(max_tokens=20, temperature=1.5, seed=4, ignore_eos=True, logprobs=2)
PROMPTS = ["The eye", "jumps", "from word to word, and rests", "z"]
IDS = [(7 * i) % 250 for i in range(150)]  # more than a step takes
SPELLED = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(root: Path, seed: int) -> dict[str, torch.Tensor]:
    drawn = tiny_tensors(tiny_config(**VALUES), copies=False, seed=seed)
    tensors = {n: (t.bfloat16() if t.ndim == 2 else t).contiguous() for n, t in drawn.items()}
    root.mkdir()
    (root / "config.json").write_text(json.dumps(VALUES))
    save_file(tensors, root / "model.safetensors")
    build_encoder().save(str(root / "tokenizer.json"))
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("threads")


@pytest.fixture(scope="module")
def weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [write(folder / str(seed), seed) for seed in (0, 1)]


def load(folder: Path, **options: Any) -> LLM:
    settings = {"device": "cpu", "dtype": "float32", "cache_tokens": 2048, "max_batch_tokens": 96, **options}
    return LLM(folder / "0", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def loaded(folder: Path, weights: object) -> LLM:
    return load(folder)


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    yield loaded
    check_empty(loaded)


def check_empty(llm: LLM) -> None:
    if llm.engine.jobs or llm.shared.inboxes:  # of a stream in a cycle, as a traceback makes one
        gc.collect()
    pages = llm.engine.scheduler.pages
    assert not llm.engine.jobs and not llm.shared.inboxes and not llm.engine.scheduler.has_work
    assert pages.free == pages.count - 1
    turns = llm.shared.turns
    assert not (turns._waiters or turns._queue or turns._posted or turns._leader or turns._owner)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads of which each test waits for the results, with a limit."""
    executor = ThreadPoolExecutor(9)
    yield executor
    executor.shutdown(wait=False, cancel_futures=True)


def get(futures: list[Future[Any]]) -> list[Any]:
    end = time.monotonic() + LIMIT
    return [future.result(max(0.0, end - time.monotonic())) for future in futures]


def wait_until(is_true: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def read(stream: Stream) -> list[int]:
    return [token for piece in stream for token in piece.token_ids]


def ask(llm: LLM, prompts: list[str] = PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [made.token_ids for made in llm.generate(prompts, params)]


def drop(llm: LLM) -> int:
    """Streams that are let go of before, in the middle and at the end: closed, or collected as garbage."""
    count = 0
    for i in range(12):
        stream = llm.stream(PROMPTS[i % 4], HOT)
        for _ in range(i % 4):
            count += len(next(stream).token_ids)
        if i % 2:
            stream.close()
        del stream
    return min(count, 1)


def look(llm: LLM) -> str:
    """What else can be asked, all the while."""
    for _ in range(20):
        str(llm.stats)
        assert llm.decode(llm.encode("abc")) == "abc"
        assert llm.score([5]) == []
        with pytest.raises(RequestError, match="prompt 1: token 999"):
            llm.generate([[1], [999]], GREEDY)
        time.sleep(0.001)
    return "looked"


CALLS: list[Callable[[LLM], Any]] = [
    ask,
    lambda llm: [[choice.token for choice in made.logprobs or ()] for made in llm.generate(PROMPTS[:2], HOT)],
    lambda llm: [s.tolist() for s in llm.generate("The eye", GREEDY, capture_selection=True)[0].selections or []],
    lambda llm: read(llm.stream(IDS, GREEDY)),
    lambda llm: "".join(piece.text for piece in llm.stream("from word to word", HOT)),
    lambda llm: llm.score(IDS),
    drop,
    look,
]


@pytest.mark.parametrize("options", [{}, {"speculate": 3}, {"cache_tokens": 320, "max_requests": 3}])
def test_eight_threads_of_mixed_calls_get_the_answers_of_one_alone(
    folder: Path, weights: object, pool: ThreadPoolExecutor, options: dict[str, int]
) -> None:
    """Also where drafts are verified in the shared steps, and where a small cache makes requests give way."""
    llm = load(folder, **options)
    alone = [call(llm) for call in CALLS]
    alone[5] = pytest.approx(alone[5], abs=1e-4)  # log-probabilities: sums in another order
    for turn in range(2):
        calls = CALLS[turn:] + CALLS[:turn]
        found = get([pool.submit(call, llm) for call in calls])
        assert found == alone[turn:] + alone[:turn]
    check_empty(llm)


def test_asyncio_calls_through_executors(llm: LLM) -> None:
    alone = [[tokens] for tokens in ask(llm)]

    async def read_one(prompt: str) -> list[int]:
        loop, stream, tokens = asyncio.get_running_loop(), llm.stream(prompt, GREEDY), list[int]()
        while (piece := await loop.run_in_executor(None, next, stream, None)) is not None:
            tokens += piece.token_ids
        return tokens

    async def run() -> list[Any]:
        loop = asyncio.get_running_loop()
        whole = [loop.run_in_executor(None, ask, llm, [prompt]) for prompt in PROMPTS]
        return await asyncio.wait_for(asyncio.gather(*whole, *map(read_one, PROMPTS)), LIMIT)

    assert asyncio.run(run()) == alone + [tokens for (tokens,) in alone]


def test_a_stream_is_read_by_other_threads_than_the_one_that_opened_it(llm: LLM, pool: ThreadPoolExecutor) -> None:
    alone = read(llm.stream("The eye", HOT))
    stream = llm.stream("The eye", HOT)
    found = [token for _ in range(5) for token in get([pool.submit(next, stream)])[0].token_ids]
    halves = get([pool.submit(read, stream) for _ in range(2)])  # at once: each piece goes to one of them
    assert found == alone[:5] and sorted(sum(halves, [])) == sorted(alone[5:])


def test_a_stream_is_closed_under_its_reader(llm: LLM, pool: ThreadPoolExecutor, monkeypatch: Any) -> None:
    stream, inside, go = llm.stream("The eye", HOT), Event(), Event()
    monkeypatch.setattr(llm.engine.model, "forward", paused(llm, inside, go))
    reader = pool.submit(read, stream)
    assert inside.wait(LIMIT)
    stream.close()  # does not wait for the step
    go.set()
    assert get([reader]) == [[]]


def paused(llm: LLM, inside: Event, go: Event) -> Callable[..., Any]:
    """A forward that says when it is inside for the first time, and waits there."""
    forward = llm.engine.model.forward

    def wait(*args: Any) -> Any:
        if not inside.is_set():
            inside.set()
            assert go.wait(LIMIT)
        return forward(*args)

    return wait


@pytest.mark.parametrize("thread", ["this", "another"])
def test_a_stream_collected_during_a_step_of_another_thread(
    llm: LLM, pool: ThreadPoolExecutor, monkeypatch: Any, thread: str
) -> None:
    """Nobody waits, no other request suffers, and the pages are free when that step ends."""
    alone, inside, go = ask(llm, PROMPTS[:1]), Event(), Event()
    doomed = [llm.stream("gone", HOT)]
    next(doomed[0])
    job = doomed[0]._job
    monkeypatch.setattr(llm.engine.model, "forward", paused(llm, inside, go))
    answer = pool.submit(ask, llm, PROMPTS[:1])
    assert inside.wait(LIMIT)
    if thread == "this":
        doomed.clear()
        gc.collect()
    else:
        get([pool.submit(lambda: doomed.clear() or gc.collect())])  # type: ignore[func-returns-value]
    assert job.finish_reason is None and not llm.shared.inboxes
    go.set()
    assert get([answer]) == [alone]
    assert job.finish_reason == "cancelled"


def test_a_short_answer_does_not_wait_for_a_long_one(llm: LLM, pool: ThreadPoolExecutor, monkeypatch: Any) -> None:
    """Five tokens take five steps, and their thread leaves in the middle of the next step of the other."""
    step, steps, shorts, has_left = llm.engine.step, list[int](), list[Any](), Event()

    def count() -> Any:
        if len(steps) == 3:
            wait_until(lambda: llm.shared.turns._queue or len(llm.engine.jobs) == 2)  # the short one has come
        shorts.extend(job for r, job in llm.engine.jobs.items() if r.prompt_length == 5 and not shorts)
        if shorts and shorts[0].finish_reason is not None:
            assert has_left.wait(LIMIT)
        steps.append(len(shorts))
        return step()

    monkeypatch.setattr(llm.engine, "step", count)
    long = pool.submit(ask, llm, ["a long one"], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    wait_until(lambda: len(steps) == 3)
    (short,) = ask(llm, ["short"], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert (len(short), sum(steps)) == (5, 5)
    has_left.set()
    assert len(get([long])[0][0]) == 30


def queue_all(llm: LLM, pool: ThreadPoolExecutor, calls: list[Callable[[], Any]]) -> list[Future[Any]]:
    """Calls whose requests are all there before the first step."""
    futures = []
    with llm.shared.turns.turn():
        for call in calls:
            futures.append(pool.submit(call))
            wait_until(lambda: len(llm.shared.turns._queue) == len(futures))
    return futures


def test_what_a_step_raises_reaches_all_who_were_in_it_and_nobody_else(
    folder: Path, weights: object, pool: ThreadPoolExecutor, monkeypatch: Any
) -> None:
    llm = load(folder, max_requests=4)
    alone = ask(llm, PROMPTS[3:])
    forward, held = llm.engine.model.forward, list[Any]()

    def fail(*args: Any) -> Any:
        if not held:
            activations = torch.ones(9)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args)

    monkeypatch.setattr(llm.engine.model, "forward", fail)
    futures = queue_all(
        llm,
        pool,
        [
            lambda: ask(llm, PROMPTS[:2]),
            lambda: read(llm.stream("a", HOT)),
            lambda: llm.score(IDS),
            lambda: ask(llm, PROMPTS[3:]),  # the fifth request: it waits for a place
        ],
    )
    for future in futures[:3]:
        with pytest.raises(MemoryRefusedError, match="no memory for a step's activations"):
            future.result(LIMIT)
    assert held[0]() is None  # errors are kept, what the step computed is not
    assert get(futures[3:]) == [alone]
    check_empty(llm)


def test_an_interrupt_of_one_thread_is_nobody_else_s(llm: LLM, pool: ThreadPoolExecutor, monkeypatch: Any) -> None:
    alone, forward, victims = ask(llm), llm.engine.model.forward, set[int]()

    def interrupt(*args: Any) -> Any:
        result = forward(*args)
        if not victims:
            victims.add(get_ident())
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(llm.engine.model, "forward", interrupt)
    futures = queue_all(llm, pool, [lambda p=p: ask(llm, [p]) for p in PROMPTS])  # type: ignore[misc]
    found = [future.exception(LIMIT) or future.result() for future in futures]
    assert [type(each) for each in found].count(KeyboardInterrupt) == 1
    assert all(each == [alone[i]] or isinstance(each, KeyboardInterrupt) for i, each in enumerate(found))


@pytest.mark.parametrize("moment", ["_take", "_choose_drafts", "cancel", "forward"])
def test_ctrl_c_in_the_thread_that_steps_loses_no_token_of_another(
    llm: LLM, pool: ThreadPoolExecutor, monkeypatch: Any, moment: str
) -> None:
    """At the worst moment: while tokens are booked, requests chosen, or others cancelled."""
    alone, fired = read(llm.stream("The eye", HOT)), Event()
    owner = {"forward": llm.engine.model, "_take": llm.engine._answers}.get(moment, llm.engine)
    whole = getattr(owner, moment)

    def interrupt(*args: Any) -> Any:
        result = whole(*args)
        if get_ident() == main_thread().ident and not fired.is_set() and llm.shared.inboxes:
            fired.set()
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, moment, interrupt)
    streams, end = [llm.stream("The eye", HOT)], time.monotonic() + LIMIT
    readers = [pool.submit(read, streams[0])]
    with pytest.raises(KeyboardInterrupt):
        while not fired.is_set() or moment == "forward":
            assert time.monotonic() < end, f"no step of this thread had another's request in it within {LIMIT} s"
            if readers[-1].done():  # it was over before this thread took a step
                streams.append(llm.stream("The eye", HOT))
                readers.append(pool.submit(read, streams[-1]))
            if moment == "cancel":
                llm.stream("z", HOT).close()
            llm.generate("other", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    assert get(readers) == [alone] * len(readers)


@pytest.mark.parametrize("staged", [True, False])
def test_weights_are_pushed_beside_threads_that_generate(
    folder: Path, weights: list[dict[str, torch.Tensor]], pool: ThreadPoolExecutor, staged: bool
) -> None:
    """Every answer is of one set of weights, and new ones come after `finish`; in place, requests are refused meanwhile."""
    llm, end, asked = load(folder), Event(), [0, 0, 0]
    sets = [ask(llm), [made.token_ids for made in LLM(folder / "1", "cpu", "float32").generate(PROMPTS, GREEDY)]]
    assert sets[0] != sets[1]

    def serve(who: int) -> set[int]:
        seen = set[int]()
        while not end.is_set():
            try:
                seen.add(sets.index(ask(llm)))
                asked[who] += 1
            except RequestError as error:
                assert "weights are incomplete" in str(error) and not staged
                time.sleep(0.001)
        return seen

    servers = [pool.submit(serve, who) for who in range(3)]
    try:
        for i in (1, 0, 1, 0):
            before = list(asked)
            wait_until(lambda before=before: all(a > b for a, b in zip(asked, before, strict=True)))  # type: ignore[misc]
            announced = {name: (SPELLED[t.dtype], tuple(t.shape)) for name, t in weights[i].items()}
            stream = llm.stream(PROMPTS[0], GREEDY)
            with llm.push(announced, staged) as push:
                with pytest.raises(LoadError, match="a push is under way"):
                    llm.push(announced, staged)
                for name, tensor in weights[i].items():
                    push.feed(name, tensor)
                push.finish()
            assert read(stream) == sets[1 - i][0]  # under way before, and nobody read it
            assert ask(llm) == sets[i]
    finally:
        end.set()
        seen = get(servers)  # type: ignore[arg-type]
    assert all(each == {0, 1} for each in seen)
    check_empty(llm)


def test_a_failing_step_does_not_hold_up_a_push(
    folder: Path, weights: list[dict[str, torch.Tensor]], monkeypatch: Any
) -> None:
    llm = load(folder)
    announced = {name: (SPELLED[t.dtype], tuple(t.shape)) for name, t in weights[1].items()}
    stream = llm.stream(PROMPTS[0], GREEDY)
    with llm.push(announced, staged=True) as push:
        for name, tensor in weights[1].items():
            push.feed(name, tensor)
        with monkeypatch.context() as broken:
            broken.setattr(llm.engine.model, "forward", lambda *_: 1 / 0)
            push.finish()
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert len(ask(llm)) == 4
    del stream
    check_empty(llm)


def test_a_thread_s_autocast_does_not_reach_the_shared_steps(llm: LLM) -> None:
    scores = llm.score(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert llm.score(IDS) == scores
