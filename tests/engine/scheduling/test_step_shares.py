"""How a step is divided: nobody is starved, nothing is left over that somebody could use."""

from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.engine.scheduling.step_shares import limit_step, share_step


def share(wants, tokens, pages=(), most=None):
    """`pages`: keys of the pages that the wants lie in, in their order."""
    return share_step(wants, tokens, dict(enumerate(pages)), tokens if most is None else most)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    assert share([1, 5000, 1, 5000, 40], 512) == [1, 470, 1, 0, 40]


def test_half_of_a_step_is_the_oldest_prompt_s():
    assert share([5000, *[30] * 20], 512) == [256, *[30] * 8, 16, *[0] * 11]
    assert share([5000, *[1] * 600], 512) == [256, *[1] * 256, *[0] * 344]


def test_equal_prompts_run_one_after_the_other():
    assert share([900, 900, 900], 512) == [512, 0, 0]
    assert share([388, 900, 900], 512) == [388, 124, 0]


def test_older_decodes_come_before_the_oldest_prompt():
    assert share([1, 1, 1, 1, 100], 3) == [1, 1, 1, 0, 0]


def test_who_would_compute_the_same_page_waits_and_leaves_its_share():
    assert share([300, 300, 300, 300], 512, [b"a", b"a", b"b", b"a"]) == [300, 0, 212, 0]
    assert share([300, 300], 600) == [300, 300]  # unnamed pages are nobody else's


def test_of_those_that_share_a_page_one_runs_though_the_oldest_has_another():
    assert share([5000, 900, 70], 512, [b"x", b"a", b"a"]) == [442, 0, 70]


wants = st.lists(st.tuples(st.sampled_from([0, 1, 1, 1, 2, 7, 60, 500]), st.sampled_from([None, b"a", b"b"])))


@settings(max_examples=300, deadline=None)
@given(wants, st.integers(1, 130))
def test_shares_of_random_steps(wants, tokens):
    wants = [(want, page if want > 1 else None) for want, page in wants]  # a decode's page is nobody else's
    sizes = share([want for want, _ in wants], tokens, [page for _, page in wants])
    given = list(zip(sizes, wants, strict=True))
    assert all(0 <= size <= want for size, (want, _) in given)
    claimed = {page for size, (_, page) in given if size and page is not None}
    assert len(claimed) == sum(size > 0 and page is not None for size, (_, page) in given)
    able = sum(want for size, (want, page) in given if size or page not in claimed)
    assert sum(sizes) == min(tokens, able)
    prompts = [i for i, (want, _) in enumerate(wants) if want > 1]
    if prompts:
        oldest = prompts[0]
        left = tokens - sum(sizes[:oldest])
        assert sizes[oldest] >= min(wants[oldest][0], -(-left // 2))
    if sum(want == 1 for want, _ in wants) <= tokens // 2:
        assert all(size == 1 for size, (want, _) in given if want == 1)


def test_a_step_is_smaller_where_some_decode_beside_prompts():
    assert limit_step([5000, 0], 0, 4096, 768) == (4096, 4096)  # nobody waits for it
    assert limit_step([1] * 300, 300, 4096, 256) == (4096, 4096)  # a place for each of their drafts
    assert limit_step([1, 1, 5000], 2, 4096, 768) == (768, 766)
    assert limit_step([1] * 700 + [5000], 700, 4096, 768) == (1084, 384)  # half is the prompts'
    assert limit_step([1] * 700 + [5000], 700, 800, 768) == (800, 384)
    assert limit_step([1, 5000], 1, 4096, 1) == (2, 1)


@settings(max_examples=300, deadline=None)
@given(wants, st.integers(1, 600), st.integers(1, 300), st.integers(0, 100))
def test_prompts_beside_decodes_keep_to_their_limit_and_all_decodes_run(wants, batch, mixed, drafts):
    wants = [want for want, _ in wants]
    decodes, prompts = wants.count(1), [i for i, want in enumerate(wants) if want > 1]
    tokens, most = limit_step(wants, decodes, batch, mixed)
    kept = min(drafts, max(0, tokens - decodes) // 2)
    sizes = share(wants, tokens - kept, most=most - kept)
    if not (decodes and prompts):
        assert (tokens, most) == (batch, batch)
        return
    assert sum(sizes[i] for i in prompts) <= mixed
    assert sum(sizes) + kept <= min(batch, max(mixed, decodes + (mixed + 1) // 2))
    if decodes + most <= batch:
        assert all(size == 1 for size, want in zip(sizes, wants, strict=True) if want == 1)
        assert sizes[prompts[0]] >= min(wants[prompts[0]], (mixed + 7) // 8)
