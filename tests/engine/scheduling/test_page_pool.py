"""Pages under random use: each is blank, owned or idle, never two of them, and what is found is what was kept."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.engine.scheduling.page_pool import Pages


def test_a_page_is_free_again_when_its_last_owner_lets_go():
    pages = Pages(5)
    mine = pages.take(2)
    pages.share(mine)
    pages.release(mine)
    assert pages.free == 2
    pages.release(mine)
    assert pages.free == 4
    with pytest.raises(ValueError, match="no owner"):
        pages.release(mine[:1])
    with pytest.raises(ValueError, match="cannot be shared"):
        pages.share(mine[:1])


def test_page_zero_is_never_given_out():
    assert sorted(Pages(9).take(8)) == list(range(1, 9))


def test_more_pages_than_free_are_refused_and_none_is_taken():
    pages = Pages(3)
    with pytest.raises(ValueError, match="3 pages asked for, 2 free"):
        pages.take(3)
    assert pages.free == 2


def test_what_is_kept_is_free_and_can_be_found():
    pages = Pages(4)
    mine = pages.take(3)
    for page, key in zip(mine, (b"a", b"b", b"c"), strict=True):
        pages.keep(page, key)
    pages.release(mine)
    assert (pages.free, pages.cached, pages.evictions) == (3, 3, 0)
    assert pages.find(b"b") == mine[1]
    pages.share([mine[0]])  # used again: the last to go now, and in nobody's reach
    assert pages.take(2) == [mine[2], mine[1]]
    assert (pages.free, pages.cached, pages.evictions) == (0, 1, 2)
    assert pages.find(b"b") is pages.find(b"c") is None
    with pytest.raises(ValueError, match="1 pages asked for, 0 free"):
        pages.take(1)


def test_of_equal_contents_the_first_is_kept():
    pages = Pages(4)
    one, other = pages.take(2)
    pages.keep(one, b"a")
    pages.keep(other, b"a")
    pages.release([other])
    assert pages.find(b"a") == one and pages.cached == 1
    with pytest.raises(ValueError, match="another content"):
        pages.keep(one, b"b")
    with pytest.raises(ValueError, match="no owner"):
        pages.keep(other, b"b")


def test_what_is_forgotten_stays_with_its_owners():
    pages = Pages(4)
    mine = pages.take(2)
    pages.keep(mine[0], b"a")
    pages.keep(mine[1], b"b")
    pages.release(mine[1:])
    pages.forget()
    assert (pages.free, pages.cached) == (2, 0) and pages.find(b"a") is None
    pages.release(mine[:1])
    assert pages.free == 3 and len(set(pages.take(3))) == 3 and pages.evictions == 0


operations = st.lists(
    st.tuples(
        st.sampled_from(["take", "release", "share", "keep", "find", "forget one", "forget all"]),
        st.integers(0, 40),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(operations, st.integers(2, 9))
def test_random_use_loses_no_page_and_gives_none_out_twice(operations, count):
    pages, mine, content, age, clock = Pages(count), Counter(), {}, {}, 0
    for what, number in operations:
        clock += 1
        held = sorted(mine)
        chosen = held[number % len(held)] if held else None
        key = b"%d" % (number % 5)
        if what == "take":
            wanted, free = number % 4, pages.free
            if wanted > free:
                with pytest.raises(ValueError, match="pages asked for"):
                    pages.take(wanted)
                continue
            blank = count - 1 - len(mine) - len([p for p in content if p not in mine])
            idle = sorted((p for p in content if p not in mine), key=age.__getitem__)
            taken = pages.take(wanted)
            assert len(set(taken)) == wanted and not set(taken) & set(mine) and 0 not in taken
            evicted = idle[: max(0, wanted - blank)]  # the least recently used, and only where no page is blank
            assert {p for p in taken if p in content} == set(evicted)
            for page in taken:
                content.pop(page, None)
                mine[page] = 1
        elif what == "release" and chosen is not None:
            pages.release([chosen])
            mine[chosen] -= 1
            age[chosen] = clock
            mine = +mine
        elif what == "share" and chosen is not None:
            pages.share([chosen])
            mine[chosen] += 1
        elif what == "keep" and chosen is not None and chosen not in content:
            pages.keep(chosen, key)
            if key not in content.values():
                content[chosen] = key
        elif what == "find":
            page = pages.find(key)
            assert page == next((p for p, k in content.items() if k == key), None)
            if page is not None:
                pages.share([page])
                mine[page] += 1
        elif what == "forget one" and chosen is not None:
            pages.forget([chosen])
            content.pop(chosen, None)
        elif what == "forget all":
            pages.forget()
            content.clear()
        assert pages.owners == [mine[page] for page in range(count)]
        assert pages.free == count - 1 - len(mine)
        assert pages.cached == len(content)
