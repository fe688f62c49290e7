"""Every "auto" of a run, resolved by a pure function."""

import numpy as np
import pytest

from saccade.api.settings.devices import choose_device, choose_kernels
from saccade.api.settings.resolve import choose_activations, choose_prefix_cache, resolve
from saccade.errors import ConfigError
from saccade.kernels import ACTIVATION_NAMES

MANY = 10**12


def settle(**changes):
    values = dict(
        path="model", device="cpu", dtype="auto", mtp=True, max_length=163_840, cache_tokens=None,
        max_batch_tokens=None, max_requests=None, free_bytes=MANY, weight_bytes=0, page_bytes=1000,
    )  # fmt: skip
    return resolve(**(values | changes))


def test_the_cpu_cache_takes_a_quarter_of_what_is_free():
    """Sessions of agents find their histories there: one context would hold those of one."""
    assert settle(free_bytes=5 * 10**8, weight_bytes=10**8).cache_bytes == 10**8
    assert settle(max_length=4096).cache_tokens == 64 * 4096  # more would serve nobody
    assert settle(max_length=100, max_requests=3).cache_tokens == 320  # whole pages
    assert settle(free_bytes=4 * 10**8, state_bytes=10**5).cache_bytes == 10**8  # with the states of requests


def test_the_cpu_cache_is_one_context_or_32768_tokens_where_a_quarter_is_less():
    assert settle(free_bytes=1_100_000).cache_tokens == 32_768
    assert settle(free_bytes=200_000, max_length=4096).cache_tokens == 4096


def test_the_gpu_cache_serves_all_requests_in_full_if_memory_allows():
    assert settle(device="cuda", max_length=4096).cache_tokens == 64 * 4096
    assert settle(device="cuda", max_length=4096, free_bytes=10**7).cache_tokens == 64 * 4096  # more than a quarter
    assert settle(device="cuda:1", max_length=4096, max_requests=2).cache_tokens == 2 * 4096


@pytest.mark.parametrize(("device", "share"), [("cpu", 0.5), ("cuda", 0.8)])
def test_the_cache_takes_only_a_share_of_what_the_weights_leave(device, share):
    found = settle(device=device, free_bytes=300_000, weight_bytes=200_000)
    assert found.cache_bytes == share * 100_000
    assert found.pages == found.cache_tokens // 64 + 1 == share * 100


def test_what_is_given_is_kept():
    found = settle(cache_tokens=1000, max_batch_tokens=7, max_requests=3)
    assert (found.cache_tokens, found.max_batch_tokens, found.max_requests) == (1024, 7, 3)


@pytest.mark.parametrize(("device", "share"), [("cpu", 0.5), ("cuda", 0.8)])
def test_so_many_requests_run_as_there_is_room_for_their_states(device, share):
    """Of GLM-5.3-Flash each has 183 MB: 64 would take 12 GB beside the weights."""
    found = settle(device=device, free_bytes=10_000_000, state_bytes=183_000)
    room = int(10_000_000 * share / 2) // 183_000 - 1
    assert found.max_requests == room < 64 and found.cache_bytes <= 10_000_000 * share
    assert found.state_bytes == (room + 1) * 183_000 == found.cache_bytes - found.pages * 1000
    assert found.notes == (f"max_requests: {room} is the default here, not 64: each has 183,000 bytes of states",)
    assert settle(device=device, state_bytes=183_000).max_requests == 64  # there is room for all
    assert settle(device=device, free_bytes=10_000_000, state_bytes=183_000, max_requests=30).max_requests == 30
    with pytest.raises(ConfigError, match="fewer cache_tokens or max_requests"):
        settle(device=device, free_bytes=10_000_000, state_bytes=183_000, max_requests=60)


@pytest.mark.parametrize("changes", [{"free_bytes": 100}, {"cache_tokens": 6400, "free_bytes": 100_999}])
def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(changes):
    with pytest.raises(ConfigError, match="bytes are free on cpu; the weights need 0 and a cache of"):
        settle(**changes)
    settle(cache_tokens=6400, free_bytes=101_000)


@pytest.mark.parametrize("name", ["cache_tokens", "max_batch_tokens", "max_mixed_tokens", "max_requests"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_senseless_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: expected an integer of at least 1"):
        settle(**{name: value})


@pytest.mark.parametrize("name", ["cache_tokens", "max_batch_tokens", "max_mixed_tokens", "max_requests"])
@pytest.mark.parametrize("value", [2**41, 10**400, 10**5000], ids=["2^41", "10^400", "10^5000"])
def test_a_number_beyond_all_memory_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: expected an integer of at least 1 and at most [0-9,]+, found"):
        settle(**{name: value})


def test_integers_of_numpy_do_not_wrap():
    found = settle(cache_tokens=np.int32(2**26), max_batch_tokens=np.int8(100), max_requests=np.uint8(200))
    assert found.cache_bytes == (2**20 + 1) * 1000
    assert {type(n) for n in (found.cache_bytes, found.max_batch_tokens, found.max_requests)} == {int}


def test_steps_with_decodes_are_as_large_as_the_model_s_size_allows():
    big = {"active": 6_214_860_800, "device": "cuda"}
    assert settle(**big).max_mixed_tokens == 768
    assert settle(**big, activations="bf16").max_mixed_tokens == 1792
    assert settle(**big, max_batch_tokens=500).max_mixed_tokens == 500
    assert settle(**big, max_mixed_tokens=np.int16(40)).max_mixed_tokens == 40
    assert settle(**big | {"active": 6_307_840}).max_mixed_tokens == 4096
    assert settle(active=big["active"]).max_mixed_tokens == 512  # a CPU has no second limit
    assert settle(max_batch_tokens=7, max_mixed_tokens=9).max_mixed_tokens == 7
    assert type(settle(max_mixed_tokens=np.int8(7)).max_mixed_tokens) is int


def test_the_device_is_chosen_by_what_is_there():
    assert choose_device("auto", 1) == "cuda"
    assert choose_device("auto", 0) == "cpu"
    assert choose_device("cpu", 2) == "cpu"
    assert choose_device("cuda:1", 2) == "cuda:1"
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        choose_device("cuda", 0)
    with pytest.raises(ConfigError, match="'cuda:2' asked for, but torch finds cuda:0 to cuda:1 here"):
        choose_device("cuda:2", 2)


@pytest.mark.parametrize("device", ["tpu", "cpu:abc", "cuda:", "cuda:-1", "cuda:x", "", 5, None, b"cpu"])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(ConfigError, match='^device: expected "auto", "cpu", "cuda" or "cuda:<number>", found'):
        choose_device(device, 2)


def test_the_fast_kernels_are_chosen_where_they_run():
    assert choose_kernels("auto", "cuda:1", "auto", 90) == choose_kernels("fast", "cuda", "auto", 100) == "fast"
    for where in (("cpu", "auto", 0), ("cuda", "float32", 90), ("cuda", "auto", 89)):
        assert choose_kernels("auto", *where) == "reference"
    assert choose_kernels("reference", "cuda", "auto", 90) == "reference"


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "message"),
    [
        ("cpu", "auto", 0, "needs a CUDA device, found device 'cpu'"),
        ("cuda", "float32", 90, "computes with weights as they are stored, dtype \"auto\", found dtype 'float32'"),
        ("cuda:1", "auto", 80, "needs compute capability 9.0, found 8.0 of cuda:1"),
    ],
)
def test_fast_kernels_elsewhere_are_refused_by_name(device, dtype, capability, message):
    with pytest.raises(ConfigError) as refusal:
        choose_kernels("fast", device, dtype, capability)
    assert str(refusal.value) == f'kernels: "fast" {message}; use "auto" or "reference"'


@pytest.mark.parametrize("value", ["quick", None, 1, ["fast"]])
def test_kernels_that_do_not_exist_are_refused(value):
    with pytest.raises(ConfigError, match='^kernels: expected "auto", "fast" or "reference", found '):
        choose_kernels(value, "cuda", "auto", 90)


def test_activations_have_three_names_and_round_nothing_in_float32():
    for kernels in ("fast", "reference"):
        found = [choose_activations(name, "auto", kernels) for name in ACTIVATION_NAMES]
        assert found == ["exact", "bf16", "fp8"] and choose_activations("exact", "float32", kernels) == "exact"
    usual = [("auto", "fast"), ("auto", "reference"), ("float32", "fast"), ("float32", "reference")]
    assert [choose_activations("auto", *how) for how in usual] == ["fp8", "exact", "exact", "exact"]
    with pytest.raises(ConfigError, match='^activations: "bf16" rounds inputs of products, dtype "float32" rounds'):
        choose_activations("bf16", "float32", "fast")
    for value in ("int8", None, 8, ["fp8"]):
        with pytest.raises(ConfigError, match='^activations: expected "auto", "exact", "bf16" or "fp8", found '):
            choose_activations(value, "auto", "fast")


def test_pages_are_kept_where_they_save_computing():
    assert [choose_prefix_cache(value, "X", False) for value in ("auto", True, False)] == [
        (True, ()), (True, ()), (False, ()),
    ]  # fmt: skip
    kept, (note,) = choose_prefix_cache("auto", "X", True)
    assert not kept and note.startswith('prefix_cache: "auto" is False: the states of X')
    assert choose_prefix_cache(False, "X", True) == (False, ())
    with pytest.raises(ConfigError, match="prefix_cache: True was asked for, but the states of X"):
        choose_prefix_cache(True, "X", True)
    for value in ("on", 1, None, ["auto"]):
        with pytest.raises(ConfigError, match='prefix_cache: expected True, False or "auto", found'):
            choose_prefix_cache(value, "X", False)


def test_settings_print_one_line_a_field():
    lines = str(settle(cache_tokens=64)).splitlines()
    assert "cache_tokens      64" in lines
    assert "index_cache       bf16" in lines and "latent_cache      bf16" in lines
    assert "activations       exact" in lines
    assert "kernels           reference" in lines
    assert "threads           1" in lines
    assert "prefix_cache      True" in lines
    assert "launch_ahead      off" in lines and settle(launch_ahead="on").launch_ahead == "on"
    assert settle(device="cuda").launch_ahead == "auto"
    assert len(lines) == 22 and "tp                1" in lines
    assert str(settle(cache_tokens=64, notes=("a note",))).splitlines() == [*lines, "a note"]
