"""What ranks say of themselves is compared, and devices are given out: each refusal is one line that names the thing."""

import pytest

from saccade.api.settings.devices import check_ranks_asked, choose_devices
from saccade.errors import ConfigError, RankError
from saccade.parallel.agree import find_neighbours, make_card, require_equal
from saccade.parallel.progress import RankProgress, find_hung


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ranks", 3, "was started as one of 3 ranks"), ("saccade", "9.9", "runs saccade 9.9"),
        ("torch", "1.0", "runs torch 1.0"), ("python", "3.9.1", "runs Python 3.9.1"), ("asked", "x", "was started with x"),
        ("max_mixed_tokens", 256, "would mix 256 tokens in a step"),
    ],
)  # fmt: skip
def test_a_card_that_differs_is_refused(key: str, value: object, said: str) -> None:
    card = make_card(2, "", 0) | {"max_mixed_tokens": 512}
    require_equal([card, dict(card)])
    with pytest.raises(RankError, match=f"rank 1 on far {said}, rank 0 ") as refused:
        require_equal([card, card | {key: value, "host": "far"}])
    assert "\n" not in str(refused.value)


def test_neighbours_are_of_one_machine() -> None:
    cards = [{"machine": m} for m in ("a", "b", "a", "", "")]
    assert [find_neighbours(cards, rank) for rank in range(5)] == [[0, 2], [1], [0, 2], [3], [4]]


def test_each_rank_has_a_device() -> None:
    assert choose_devices("auto", 0, 2) == ["cpu", "cpu"] and choose_devices("auto", 4, 1) == ["cuda"]
    assert choose_devices("cuda", 4, 2) == ["cuda:0", "cuda:1"]
    assert choose_devices("cuda:3,cuda:1", 4, 2) == ["cuda:3", "cuda:1"]
    assert choose_devices("cuda:0,cuda:0", 1, 2) == ["cuda:0", "cuda:0"]
    for device, count, ranks, said in (
        ("auto", 2, 4, "tp: 4 ranks of this machine need a GPU each, torch finds 2"), ("cuda:1", 2, 2, "a list as in"),
        ("cuda:0,cuda:1", 2, 3, "one for each of the 3 ranks"), ("cuda", 0, 2, "no CUDA device"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            choose_devices(device, count, ranks)
    for asked in ((0, 1, False), (2, "1", False), (True, 1, False), (2, 1, 1)):
        with pytest.raises(ConfigError):
            check_ranks_asked(*asked)


def test_who_is_behind_and_still_hangs() -> None:
    far, near = RankProgress(5, 40), RankProgress(5, 39)
    assert find_hung({0: far, 1: near, 2: far}, {0: 99, 1: 99, 2: 99}, 60) == 1
    assert find_hung({0: far, 1: near, 2: far}, {0: 99, 1: 3, 2: 99}, 60) is None  # not for long
    assert find_hung({0: far, 1: far}, {0: 99, 1: 99}, 60) is None  # all compute
    assert find_hung({0: far, 1: near._replace(is_compiling=True)}, {0: 99, 1: 99}, 60) is None
