"""Keys of pages: the same in every process, another one for whatever changes a row."""

import os
import subprocess
import sys

import pytest

from saccade.engine.scheduling.prefix_keys import PrefixKeys, make_root
from saccade.kernels import PAGE

TOKENS = [(11 * i) % 97 for i in range(4 * PAGE)]


def find_keys(tokens, root=b"root", is_followed=False):
    keys = []
    PrefixKeys(root, is_followed).extend(keys, tokens)
    return keys


def change(place, token=1000):
    return [*TOKENS[:place], token, *TOKENS[place + 1 :]]


def test_only_full_pages_have_keys():
    assert [len(find_keys(TOKENS[:n])) for n in (0, PAGE - 1, PAGE, 4 * PAGE)] == [0, 0, 1, 4]
    # A drafting layer's row of a page's last token is known with the token after it.
    assert [len(find_keys(TOKENS[:n], is_followed=True)) for n in (0, PAGE, PAGE + 1, 4 * PAGE)] == [0, 0, 1, 3]


@pytest.mark.parametrize("is_followed", [False, True])
def test_keys_grow_with_the_tokens(is_followed):
    keys, how = [], PrefixKeys(b"root", is_followed)
    for length in range(0, len(TOKENS) + 1, 13):
        how.extend(keys, TOKENS[:length])
        assert keys == find_keys(TOKENS[:length], is_followed=is_followed)


@pytest.mark.parametrize("place", [0, 1, PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 3 * PAGE + 5])
def test_a_token_changes_its_page_and_all_behind(place):
    for is_followed in (False, True):
        same = [a == b for a, b in zip(find_keys(TOKENS, is_followed=is_followed),
                                       find_keys(change(place), is_followed=is_followed), strict=True)]  # fmt: skip
        first = (place - is_followed) // PAGE if place else 0  # followed: also the page of the token before
        assert same == [page < first for page in range(len(same))]


def test_the_root_changes_all():
    assert not set(find_keys(TOKENS)) & set(find_keys(TOKENS, b"other"))
    roots = [make_root("path", "auto", 1), make_root("path", "auto", 2), make_root("pathauto", "", 1)]
    assert len(set(roots)) == 3


def test_another_process_finds_the_same_keys():
    """Whatever its hash seed: ranks replicate the scheduler."""
    program = (
        "from saccade.engine.scheduling.prefix_keys import PrefixKeys, make_root; keys = []\n"
        "PrefixKeys(make_root('model', 1)).extend(keys, [(11 * i) % 97 for i in range(128)]); print(keys[-1].hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {find_keys(TOKENS[: 2 * PAGE], make_root("model", 1))[-1].hex()}
