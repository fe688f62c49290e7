"""The prefix cache as a game: what a request finds is what it would have computed, and nobody writes to it.

A page's content is kept as the tokens that each row depends on, so that a wrong hit, a row written over or a page given
out too early shows. tests/engine/scheduling/test_prefix_texts.py runs a model.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.page_pool import count_pages
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.engine.scheduling.requests import Request
from saccade.errors import RequestError
from saccade.kernels import PAGE


class Game:
    """A scheduler, and what its pages would hold. `drafts`: the drafting layer runs, or None without one."""

    def __init__(self, pages=20, budget=128, requests=8, drafts=None, max_length=900, prefix=True, mixed=None):
        self.drafts = drafts
        keys = PrefixKeys(b"root", drafts is not None) if prefix else None
        self.scheduler = Scheduler(pages, budget, requests, max_length, keys, mixed)
        self.rows, self.followed = {}, {}  # (page, place) -> the tokens it depends on
        self.ran = 0  # tokens

    def add(self, tokens, max_tokens=4, **options):
        return self.scheduler.add(tokens, SamplingParams(max_tokens=max_tokens), **options)

    def check_pool(self):
        """Owners are those who have a page, and each page is blank, owned or idle."""
        pool, owned = self.scheduler.pages, [p for r in self.scheduler.running for p in r.pages]
        assert [owned.count(page) for page in range(pool.count)] == pool.owners
        assert all(len(r.pages) == len(set(r.pages)) for r in self.scheduler.running)
        assert 0 not in owned and not any(r.pages or r.computed for r in self.scheduler.waiting)
        assert pool.free == pool.count - 1 - len(set(owned))
        assert sorted([*pool._blank, *pool._idle, *set(owned)]) == list(range(1, pool.count))
        assert set(pool._idle) <= set(pool._keys) and not set(pool._blank) & set(pool._keys)

    def step(self, guesses=None, accept=0):
        """One step. The model answers the sum of all tokens so far, modulo 3; the drafting layer guesses with every
        other token wrong."""
        scheduler = self.scheduler
        guesses = (self.drafts or 0) if guesses is None else guesses
        if guesses:
            scheduler.catch_up()
        chunks = scheduler.schedule(guesses)
        self.check_pool()
        assert sum(chunk.size for chunk in chunks) <= scheduler.max_batch_tokens
        for request, size, ahead in chunks:
            written = request.pages[request.computed // PAGE : count_pages(request.computed + size + max(0, ahead - 1))]
            for page in written:
                assert scheduler.pages.owners[page] == 1 and page not in scheduler.pages._keys
            for position in range(request.computed):
                at = request.pages[position // PAGE], position % PAGE
                assert self.rows[at] == request.tokens[: position + 1]
                if self.drafts is not None and position < request.followed:
                    assert self.followed[at] == request.tokens[: position + 2]
        for chunk in chunks:
            self.run(chunk, guesses)
        self.check_pool()
        return chunks

    def run(self, chunk, guesses):
        request, size, ahead = chunk
        self.ran += size
        known, is_last = len(request.tokens), chunk.is_last
        text = [*request.tokens, *request.draft]
        chosen = []
        while chunk.is_last and request.targets is None:
            chosen.append(sum([*request.tokens, *chosen]) % 3)
            place = len(chosen) - 1
            if place >= len(request.draft) or request.draft[place] != chosen[-1]:
                break
        chosen = chosen[: request.max_length - known]
        runs_layer = self.drafts is not None and request.targets is None and (guesses > 0 or request.pending > 1)
        following = [*request.tokens, *chosen, -1]
        for position in range(request.computed, request.computed + size):
            at = request.pages[position // PAGE], position % PAGE
            self.rows[at] = text[: position + 1]
            self.followed[at] = [*text[: position + 1], *following[position + 1 : position + 2]] if runs_layer else None
        end = request.computed + size
        # Rows of guesses; those behind the longest text go to page 0.
        for position in range(end, min(end + max(0, ahead - 1), len(request.pages) * PAGE)):
            at = request.pages[position // PAGE], position % PAGE
            self.rows[at] = self.followed[at] = None
        made = None
        if runs_layer:
            made = [sum([*request.tokens, *chosen]) % 3, 5] * 3
        self.scheduler.advance(chunk, chosen, made)
        if is_last and len(request.tokens) >= request.max_length - (request.targets is not None):
            self.scheduler.finish(request, "length")

    def finish(self, limit=3000):
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.pages.free == self.scheduler.pages.count - 1


def text(length, seed=0):
    return [(seed + i * i) % 7 for i in range(length)]


@pytest.mark.parametrize("drafts", [None, 0, 3])
def test_the_second_request_computes_what_is_new(drafts):
    game = Game(budget=64, drafts=drafts)
    first = game.add(text(200))
    game.finish()
    before = game.ran
    second = game.add([*text(150), 9, 9])
    game.finish()
    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert game.ran - before < 24 + 20
    tally = game.scheduler.prefix_tally
    assert (tally.looked_up, tally.found, tally.evictions) == (352, 128, 0)
    assert "128 of 352 prompt tokens found (36%); " in str(tally)


def test_the_last_token_of_a_prompt_always_runs():
    for length in (128, 129):
        game = Game()
        game.add(text(length))
        game.finish()
        again = game.add(text(length))
        game.finish()
        assert again.cached_tokens == (length - 1) // PAGE * PAGE


def test_a_drafting_layer_s_row_also_hangs_on_the_next_token():
    for drafts, found in ((None, 128), (0, 64)):
        game = Game(drafts=drafts)
        game.add([*text(128), 1, 1])
        game.finish()
        other = game.add([*text(128), 2, 2])
        game.finish()
        assert other.cached_tokens == found


def test_an_answer_is_found_by_the_next_turn():
    game = Game(drafts=2)
    turn = game.add(text(60), max_tokens=80)
    game.finish()
    turn = game.add([*turn.tokens, 4, 4], max_tokens=4)
    game.finish()
    assert turn.cached_tokens == 128


def test_answers_that_the_drafting_layer_did_not_see_are_not_found():
    """Its rows of them are missing, and the prompts it follows at all times."""
    game = Game(drafts=0)
    turn = game.add(text(70), max_tokens=80)
    game.finish()
    turn = game.add([*turn.tokens, 4, 4], max_tokens=4)
    game.finish()
    assert turn.cached_tokens == 64


def test_a_request_that_the_drafting_layer_lags_behind_finds_nothing():
    """Else the layer's rows in between would count as right."""
    game = Game(drafts=2)
    game.add(text(200))
    game.finish()
    lagging = Request(9, text(200), 200, 300, computed=10, followed=4)
    game.scheduler._prefix.find(lagging)
    assert lagging.computed == 10 and not lagging.pages


def test_equal_prompts_side_by_side_are_computed_once():
    game = Game(budget=100)
    requests = [game.add(text(290), max_tokens=1) for _ in range(4)]
    other = game.add(text(90, 3), max_tokens=1)
    game.finish()
    assert game.ran == 290 + 3 * (290 - 256) + 90
    assert [r.cached_tokens for r in requests] == [0, 256, 256, 256] and other.cached_tokens == 0


def test_if_the_one_that_computes_goes_the_next_one_does():
    game = Game(budget=64)
    first, second = (game.add(text(290), max_tokens=1) for _ in range(2))
    game.step()
    assert (first.computed, second.computed) == (64, 0)
    game.scheduler.cancel(first)
    game.finish()
    assert second.cached_tokens == 64


def test_pages_are_counted_once_for_all_who_share_them():
    """Nine pages: five of a common beginning, and one for each of four requests."""
    game = Game(pages=10, budget=1000)
    game.add(text(321), max_tokens=1)
    game.finish()
    requests = [game.add([*text(320), 8, i], max_tokens=2) for i in range(4)]
    chunks = game.step()
    assert [(chunk.request, chunk.size) for chunk in chunks] == [(request, 2) for request in requests]
    assert game.scheduler.pages.free == 0 and game.scheduler.preemptions == 0
    game.finish()


def test_a_cache_full_of_kept_pages_is_free():
    game = Game(pages=6, max_length=330)
    for seed in range(7):
        game.add(text(300, seed), max_tokens=2)
        game.finish()
        assert game.scheduler.pages.cached >= 4
    assert game.scheduler.pages.evictions > 20


def test_least_recently_used_prefixes_go_first():
    game = Game(pages=9)
    for seed in (0, 1, 0, 2, 0, 3):  # two pages each, room for eight in all with what runs
        game.add(text(140, seed), max_tokens=1)
        game.finish()
    for seed, found in ((0, 128), (3, 128), (1, 64)):  # of the one used least, the last page went
        again = game.add(text(140, seed), max_tokens=1)
        game.finish()
        assert again.cached_tokens == found


def test_a_preempted_request_finds_its_own_pages():
    game = Game(pages=6)
    old, young = game.add(text(120), max_tokens=60), game.add(text(125, 1), max_tokens=30)
    for _ in range(30):
        if not young.preemptions:
            game.step()
    before, known = game.ran, len(young.tokens)
    assert young.preemptions == 1 and known > 128 and young.computed == 0
    game.finish()
    assert game.ran - before < 60 + 30 + known - 2 * PAGE  # without them: all of its tokens again
    assert young.cached_tokens == old.cached_tokens == 0 and len(young.tokens) == 155


def test_what_is_computed_again_is_kept_again():
    game = Game(budget=300)
    request = game.add(text(200), max_tokens=9)
    game.step()
    game.scheduler._preempt(request)
    game.scheduler.pages.forget()  # as if all had been evicted meanwhile
    game.finish()
    again = game.add(text(200))
    game.finish()
    assert again.cached_tokens == 192


def test_a_failed_request_leaves_nothing():
    game = Game()
    game.add(text(140))
    game.finish()
    failing = game.add([*text(140), *text(80, 5)])
    game.step()
    assert game.scheduler.pages.cached == 3 and failing.computed > 200
    game.scheduler.finish(failing, "error")
    game.check_pool()
    again = game.add(text(140))  # both of its pages were the failed one's too
    game.finish()
    assert again.cached_tokens == 0


def test_a_cancelled_request_gives_its_pages_back_and_others_find_them():
    game = Game(budget=100)
    gone = game.add(text(300))
    game.step()
    assert game.scheduler.pages.free < 19
    game.scheduler.cancel(gone)
    game.check_pool()
    assert game.scheduler.pages.free == 19
    again = game.add(text(300))
    game.finish()
    assert again.cached_tokens == 64


def test_whole_requests_compute_every_row_once():
    """A scoring request or one that captures: what others left is not used, and what it leaves is."""
    game = Game(budget=100, pages=8, max_length=400)
    game.add(text(200))
    game.finish()
    for is_scoring in (True, False):
        before = game.ran
        whole = game.scheduler.add_scoring(text(201)) if is_scoring else game.add(text(200), 1, is_whole=True)
        game.finish()
        assert game.ran - before == 200 and whole.cached_tokens == 0
    assert game.scheduler.prefix_tally.looked_up == 200
    whole = game.add(text(200, 3), max_tokens=1, is_whole=True)
    game.step()
    game.scheduler._preempt(whole)
    game.finish()  # it has had the rows of its first page
    assert whole.computed == 0 and game.ran - before == 200 + 100 + 136
    follower = game.add(text(200, 3), max_tokens=1)
    game.finish()
    assert follower.cached_tokens == 192


def test_nothing_is_found_behind_a_change_of_weights():
    game = Game()
    game.add(text(200))
    with pytest.raises(ValueError, match="0 requests|1 requests"):
        game.step()
        game.scheduler.forget_prefixes()
    game.finish()
    game.scheduler.forget_prefixes()
    game.check_pool()
    again = game.add(text(200))
    game.finish()
    assert again.cached_tokens == 0


def test_without_the_cache_nothing_is_kept():
    game = Game(prefix=False)
    for _ in range(2):
        request = game.add(text(200))
        game.finish()
        assert request.cached_tokens == 0
    assert game.scheduler.prefix_tally is None and game.scheduler.pages.cached == 0


def test_a_long_prompt_holds_up_nobody():
    game = Game(pages=40, budget=64, max_length=2000)
    decode = game.add([1], max_tokens=30)
    game.step()
    long = game.add(text(1500), max_tokens=2)
    for _ in range(3):
        game.step()
    short = game.add(text(20, 1), max_tokens=4)
    game.step()
    assert len(short.generated) == 1  # in the step in which it came
    assert len(decode.generated) == 5  # one token in each
    for _ in range(3):
        game.step()
    assert short.finish_reason == "length" and not long.generated


moves = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 3), st.integers(1, 330), st.integers(1, 70)),
        st.tuples(st.just("go on"), st.integers(0, 30), st.integers(1, 80), st.integers(1, 30)),
        st.tuples(st.just("score"), st.integers(0, 3), st.integers(2, 200), st.just(0)),
        st.tuples(st.just("capture"), st.integers(0, 3), st.integers(1, 200), st.integers(1, 9)),
        st.tuples(st.just("step"), st.integers(1, 9), st.sampled_from([0, 0, 1, 3]), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("fail"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("look into"), st.integers(1, 5), st.just(0), st.just(0)),
    ),
    max_size=40,
)


def play(moves, pages, budget, requests, drafts):
    """Sessions that branch: whoever goes on begins with tokens of an earlier one, cut anywhere."""
    game, asked = Game(pages, budget, requests, drafts, max_length=500, mixed=min(budget, 60)), []
    for what, a, b, c in moves:
        try:
            if what == "ask":
                asked.append(game.add(text(b, a), max_tokens=c))
            elif what == "go on" and asked:
                before = asked[a % len(asked)].tokens
                asked.append(game.add([*before[: max(1, len(before) - b // 2)], *text(b, a)], max_tokens=c))
            elif what == "score":
                asked.append(game.scheduler.add_scoring(text(b, a)))
            elif what == "capture":
                asked.append(game.add(text(b, a), max_tokens=c, is_whole=True))
        except RequestError:
            continue
        if what == "step":
            for _ in range(a):
                game.step(min(b, game.drafts or 0))
        elif what in ("cancel", "fail") and asked:
            game.scheduler.finish(asked[a % len(asked)], "error" if what == "fail" else "cancelled")
        elif what == "look into" and a <= game.scheduler.pages.free:
            taken = game.scheduler.pages.take(a)  # as causes.py does between two steps
            for page in taken:
                game.rows |= {(page, place): None for place in range(PAGE)}
            game.scheduler.pages.release(taken)
        game.check_pool()
    game.finish()
    for request in asked:
        answer = request.tokens[: request.prompt_length]
        for token in request.generated:
            assert token == sum(answer) % 3
            answer.append(token)
        assert not request.is_whole or request.cached_tokens == 0
    tally = game.scheduler.prefix_tally
    assert tally.found == sum(r.cached_tokens for r in asked) <= tally.looked_up
    return game


@settings(max_examples=60, deadline=None)
@given(
    moves, st.integers(9, 16), st.sampled_from([3, 40, 128, 700]), st.integers(1, 5), st.sampled_from([None, 0, 2, 5])
)
def test_random_sessions_find_what_they_would_have_computed(moves, pages, budget, requests, drafts):
    play(moves, pages, budget, requests, drafts)


@pytest.mark.soak
@settings(max_examples=3000, deadline=None)
@given(
    moves, st.integers(9, 16), st.sampled_from([3, 40, 128, 700]), st.integers(1, 5), st.sampled_from([None, 0, 2, 5])
)
def test_many_random_sessions_find_what_they_would_have_computed(moves, pages, budget, requests, drafts):
    play(moves, pages, budget, requests, drafts)
