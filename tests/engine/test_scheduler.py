"""The scheduler as a game against random arrivals, ends and cancellations: no page leaks, nobody starves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import PAGE, Scheduler
from saccade.engine.scheduling.page_pool import count_pages
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.engine.scheduling.requests import UNKNOWN
from saccade.errors import RequestError


def check_pages(scheduler):
    """Every page has exactly the owners that the requests say it has, and only running requests own any."""
    owned = [page for request in scheduler.running for page in request.pages]
    assert len(owned) == len(set(owned))
    assert 0 not in owned
    assert sorted(owned) == [page for page, owners in enumerate(scheduler.pages.owners) if owners]
    assert scheduler.pages.free + len(owned) == scheduler.pages.count - 1
    assert all(not r.pages and r.computed == r.followed == 0 and not r.draft for r in scheduler.waiting)


def check_order(scheduler):
    ids = [request.id for request in (*scheduler.running, *scheduler.waiting)]
    assert ids == sorted(ids)


def count_guessed(scheduler):
    """Pages that running requests own beyond their known tokens."""
    return sum(max(0, len(r.pages) - count_pages(len(r.tokens))) for r in scheduler.running)


def run_step(scheduler, guesses=0):
    """One step with a model that always answers 7 and accepts half of each draft. Returns the chunks. With `guesses`,
    a drafting layer makes as many drafts as there is room for; else some requests get drafts from elsewhere."""
    chunks = scheduler.schedule(guesses)
    check_pages(scheduler)
    check_order(scheduler)
    used = sum(chunk.size for chunk in chunks)
    assert used <= scheduler.max_batch_tokens
    prompts = [chunk.size for chunk in chunks if chunk.request.pending > 1]
    if prompts and len(prompts) < len(chunks):  # somebody decodes beside them; drafts may have the place of a decode
        mixed = scheduler.max_mixed_tokens  # that was laid out, and then preempted
        assert sum(prompts) <= mixed and used <= max(mixed, scheduler.max_requests + (mixed + 1) // 2)
    assert len(scheduler.running) <= scheduler.max_requests
    assert len({chunk.request.id for chunk in chunks}) == len(chunks)
    # Half of a step's tokens may be kept for drafts; where there are more left, nobody waits for a page of a guess.
    if scheduler.waiting and 2 * used < scheduler.max_mixed_tokens and len(scheduler.running) < scheduler.max_requests:
        assert count_pages(len(scheduler.waiting[0].tokens)) > scheduler.pages.free + count_guessed(scheduler)
    for chunk in chunks:
        request = chunk.request
        assert chunk.size >= 1
        assert 0 <= chunk.ahead <= guesses
        rows = request.computed + chunk.size + max(0, chunk.ahead - 1)
        assert len(request.pages) * PAGE >= min(rows, request.max_length)
        assert len(request.tokens) + len(request.draft) < request.max_length
        assert len(request.tokens) + 1 + chunk.ahead < request.max_length or not chunk.ahead
        assert not request.draft or chunk.size == request.pending + len(request.draft)
    for chunk in chunks:
        request, length = chunk.request, len(chunk.request.tokens)
        tokens = [7] * (1 + len(request.draft) // 2) if chunk.is_last else []
        scheduler.advance(chunk, tokens, [7] * guesses if guesses else None)
        assert request.computed <= len(request.tokens)
        assert not tokens or request.computed == len(request.tokens) - 1 == length + len(tokens) - 1
        assert request.followed == (request.computed if guesses else 0)
        if len(request.tokens) >= request.max_length:
            scheduler.finish(request, "length")
        elif tokens and not guesses:
            request.draft = [7] * (request.id % 4)
    check_pages(scheduler)
    return chunks


def test_a_prompt_is_cut_to_the_token_budget_and_decodes_come_first():
    scheduler = Scheduler(pages=20, max_batch_tokens=100, max_requests=4, max_length=1000)
    first = scheduler.add([1] * 150, SamplingParams(max_tokens=5))
    second = scheduler.add([1] * 150, SamplingParams(max_tokens=5))
    steps = [[(chunk.request, chunk.size) for chunk in run_step(scheduler)] for _ in range(4)]
    assert steps == [
        [(first, 100)],
        [(first, 50), (second, 50)],
        [(first, 1), (second, 99)],
        [(first, 1), (second, 1)],
    ]


def test_a_step_in_which_somebody_decodes_is_smaller():
    scheduler = Scheduler(pages=40, max_batch_tokens=400, max_requests=4, max_length=1600, max_mixed_tokens=50)
    decodes = [scheduler.add([1] * 5, SamplingParams(max_tokens=60)) for _ in range(2)]
    run_step(scheduler)
    for request in decodes:
        request.draft = [7] * 30
    assert sorted(chunk.size for chunk in run_step(scheduler)) == [31, 31]  # no prompt: as many as there are
    for request in decodes:
        request.draft = []
    prompt = scheduler.add([1] * 1000, SamplingParams(max_tokens=5))
    assert [chunk.size for chunk in run_step(scheduler)] == [1, 1, 48]
    for request in decodes:
        request.draft = [7] * 30
    assert [chunk.size for chunk in run_step(scheduler)] == [25, 1, 24]  # drafts are in it, half of it at most
    for request in decodes:
        scheduler.cancel(request)
    assert [(chunk.request, chunk.size) for chunk in run_step(scheduler)] == [(prompt, 400)]


def test_a_full_cache_preempts_the_youngest_which_keeps_its_tokens():
    scheduler = Scheduler(pages=4, max_batch_tokens=200, max_requests=4, max_length=1000)
    old = scheduler.add([1] * 64, SamplingParams(max_tokens=60))
    young = scheduler.add([2] * 64, SamplingParams(max_tokens=60))
    run_step(scheduler)
    assert scheduler.running == [old, young]
    run_step(scheduler)  # both need a second page; three are there
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young]
    assert young.preemptions == scheduler.preemptions == 1
    assert young.tokens == [2] * 64 + [7]
    for _ in range(200):
        run_step(scheduler)
    assert (old.finish_reason, young.finish_reason) == ("length", "length")
    assert len(young.tokens) == 124
    assert scheduler.pages.free == 3


def test_a_big_request_is_not_overtaken():
    scheduler = Scheduler(pages=4, max_batch_tokens=500, max_requests=4, max_length=1000)
    scheduler.add([1] * 100, SamplingParams(max_tokens=20))
    big = scheduler.add([1] * 150, SamplingParams(max_tokens=5))
    small = scheduler.add([1], SamplingParams(max_tokens=5))
    run_step(scheduler)
    assert list(scheduler.waiting) == [big, small]


def test_a_draft_never_takes_another_request_s_pages():
    scheduler = Scheduler(pages=3, max_batch_tokens=500, max_requests=4, max_length=1000)
    guesser = scheduler.add([1] * 60, SamplingParams(max_tokens=60))
    other = scheduler.add([1] * 60, SamplingParams(max_tokens=4))
    run_step(scheduler)
    guesser.draft, other.draft = [7] * 8, []
    chunks = run_step(scheduler)
    # 61 tokens are known; three guesses more fit into the page
    assert [(chunk.request, chunk.size) for chunk in chunks] == [(guesser, 4), (other, 1)]
    assert scheduler.preemptions == 0


def test_pages_of_guesses_go_to_whoever_needs_them():
    scheduler = Scheduler(pages=4, max_batch_tokens=500, max_requests=4, max_length=1000)
    guesser = scheduler.add([1] * 61, SamplingParams(max_tokens=60))
    other = scheduler.add([1] * 63, SamplingParams(max_tokens=60))
    chunks = run_step(scheduler, 5)
    # 61 rows, and four of guesses behind the first, end in a second page; the other's guesses have none left
    assert [len(request.pages) for request in (guesser, other)] == [2, 1]
    assert [chunk.ahead for chunk in chunks] == [5, 2]
    other.draft = []
    scheduler.advance(scheduler.schedule()[1], [7])  # 64 known
    scheduler.schedule()
    assert (len(guesser.pages), len(other.pages), scheduler.preemptions) == (1, 2, 0)
    latecomer = scheduler.add([2] * 60, SamplingParams(max_tokens=4))
    other.draft = guesser.draft = []
    assert latecomer not in [chunk.request for chunk in scheduler.schedule(5)]  # 3 pages, all for known tokens


def test_drafts_leave_half_of_a_step_to_prompts():
    scheduler = Scheduler(pages=40, max_batch_tokens=20, max_requests=8, max_length=1000)
    decodes = [scheduler.add([1], SamplingParams(max_tokens=60)) for _ in range(4)]
    run_step(scheduler)
    for request in decodes:
        request.draft = [7] * 5
    prompt = scheduler.add([1] * 100, SamplingParams(max_tokens=5))
    sizes = {chunk.request: chunk.size for chunk in run_step(scheduler)}
    assert sizes[prompt] == 8 and [sizes[r] for r in decodes] == [6, 4, 1, 1]


def test_catching_up_runs_again_what_the_drafting_layer_has_not_seen():
    scheduler = Scheduler(pages=9, max_batch_tokens=64, max_requests=2, max_length=200)
    request = scheduler.add([1] * 10, SamplingParams(max_tokens=100))
    for guesses in (2, 0, 0, 0):
        (chunk,) = scheduler.schedule(guesses)
        scheduler.advance(chunk, [7], [7, 7][:guesses] if guesses else None)
        request.draft = []
    assert (request.computed, request.followed, len(request.tokens)) == (13, 10, 14)
    scheduler.catch_up()
    (chunk,) = scheduler.schedule(2)
    assert (chunk.size, chunk.is_last, chunk.ahead) == (4, True, 2)
    scheduler.advance(chunk, [7], [5, 6])
    assert (request.computed, request.followed, request.draft) == (14, 14, [5, 6])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "text"),
    [
        (0, None, "the prompt is empty"),
        (300, None, "300 tokens; the context is 300"),
        (250, 51, "make 301; the context is 300"),
        (193, None, "193 tokens; the cache holds 192"),
        (192, 2, "need 193 cache rows; the cache holds 192"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(prompt, max_tokens, text):
    scheduler = Scheduler(pages=4, max_batch_tokens=64, max_requests=2, max_length=300)
    with pytest.raises(RequestError, match=text):
        scheduler.add([1] * prompt, SamplingParams(max_tokens=max_tokens))
    assert not scheduler.has_work


def test_what_just_fits_runs_to_its_length():
    scheduler = Scheduler(pages=4, max_batch_tokens=64, max_requests=2, max_length=300)
    request = scheduler.add([1] * 192, SamplingParams(max_tokens=1))
    open_end = scheduler.add([1] * 10, SamplingParams())
    while scheduler.has_work:
        run_step(scheduler)
    assert request.generated == [7]
    assert len(open_end.tokens) == 193


def test_a_scoring_request_runs_all_but_its_last_token():
    scheduler = Scheduler(pages=4, max_batch_tokens=64, max_requests=2, max_length=100)
    request = scheduler.add_scoring(range(100))
    assert request.tokens == list(range(99))
    assert request.targets == list(range(1, 100))
    with pytest.raises(RequestError, match="context is 100"):
        scheduler.add_scoring(range(101))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (301, "301 tokens to score; the context is 300"),
        (194, "194 tokens to score need 193 cache rows; the cache holds 192"),
        (1, "1 tokens to score; expected two at least"),
    ],
)
def test_what_cannot_be_scored_is_refused_without_a_word_about_generation(count, text):
    scheduler = Scheduler(pages=4, max_batch_tokens=64, max_requests=2, max_length=300)
    with pytest.raises(RequestError, match=text) as caught:
        scheduler.add_scoring(range(count))
    assert "max_tokens" not in str(caught.value) and "prompt" not in str(caught.value)
    assert not scheduler.has_work
    assert len(scheduler.add_scoring(range(193)).tokens) == 192


arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps before it comes
        st.integers(1, 260),  # prompt
        st.integers(1, 90),  # tokens to generate
        st.one_of(st.none(), st.none(), st.integers(0, 40)),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120, deadline=None)
@given(
    arrivals, st.integers(6, 14), st.sampled_from([3, 40, 128, 700]), st.integers(1, 5), st.sampled_from([0, 1, 5]),
    st.sampled_from([1, 12, 100, 700]),
)  # fmt: skip
def test_random_traffic_leaks_no_page_and_starves_nobody(arrivals, pages, budget, max_requests, guesses, mixed):
    scheduler = Scheduler(pages, budget, max_requests, max_length=400, max_mixed_tokens=min(mixed, budget))
    preempt = scheduler._preempt

    def preempt_for_known_tokens(request):
        assert count_guessed(scheduler) == 0
        preempt(request)

    scheduler._preempt = preempt_for_known_tokens
    requests, doomed, clock, work = [], {}, 0, 0
    # Of the oldest prompt in a step: beside decodes half of what drafts leave of half the limit.
    least = budget if mixed >= budget else max(1, mixed // 8)

    def tick():
        nonlocal clock
        for request in [r for r, end in doomed.items() if end <= clock]:
            scheduler.cancel(request)
            doomed.pop(request)
        run_step(scheduler, guesses)
        clock += 1

    for wait, prompt, count, cancel in arrivals:
        for _ in range(wait):
            tick()
        try:
            request = scheduler.add([1] * prompt, SamplingParams(max_tokens=count))
        except RequestError:
            assert count_pages(prompt + count - 1) > pages - 1
            continue
        requests.append(request)
        work += prompt // least + 1 + count
        if cancel is not None:
            doomed[request] = clock + cancel
    # The oldest request runs in every step and is never preempted, so each needs at most its own steps, in turn.
    for _ in range(work + 1):
        if scheduler.has_work:
            tick()
    for request in requests:
        assert request.finish_reason in ("length", "cancelled")
        assert request.finish_reason == "cancelled" or len(request.tokens) == request.max_length
    assert not scheduler.has_work
    assert scheduler.pages.free == pages - 1
    assert not any(scheduler.pages.owners)


def test_a_page_is_named_only_by_tokens_that_are_known():
    keys = PrefixKeys(b"booked")
    scheduler = Scheduler(10, 200, 2, 400, keys)
    request = scheduler.add([7] * 126, SamplingParams(max_tokens=9))
    for token in (1, 2, 3, 4):  # each step is booked before the choice of the one in front of it is known
        for chunk in scheduler.schedule():
            scheduler.book(chunk, 0)
        if request.unknown == 2:
            scheduler.settle(request, token)
    right: list[bytes] = []
    keys.extend(right, [7] * 126 + [2, 3])
    assert request.tokens[126:] == [2, 3, 4, UNKNOWN] and request.keys == right
    assert [scheduler.pages.find(key) for key in right] == request.pages[:2]
    scheduler.finish(request, "stop")
    assert request.generated == [2, 3, 4]
