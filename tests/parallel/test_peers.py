"""Memory that GPUs share, without a GPU: what ranks tell each other, and what is given back."""

import contextlib
import gc

import pytest
import torch

from saccade.errors import RankError
from saccade.models.parameters import Layout
from saccade.parallel import peers


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's calls, as they come; rank r's handle is "r", and opens as the address 100 + r."""
    found: list[str] = []

    def refuse(handle: bytes) -> int:
        if handle == b"3":
            raise RuntimeError("cudaIpcOpenMemHandle: invalid device context")
        found.append(f"open {handle.decode()}")
        return 100 + int(handle)

    monkeypatch.setattr(peers, "allocate_zeros", lambda size: found.append(f"allocate {size}") or 7)
    monkeypatch.setattr(peers, "make_handle", lambda address: b"1")
    monkeypatch.setattr(peers, "open_handle", refuse)
    monkeypatch.setattr(peers, "close_handle", lambda address: found.append(f"close {address}"))
    monkeypatch.setattr(peers, "free", lambda address: found.append(f"free {address}"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return found


def share(handles: list[str], said: list[str] | None = None) -> peers.SharedMemory:
    """Rank 1's; the others tell `handles`, and then `said`."""
    rounds = iter([handles, said or [""] * len(handles)])

    def collect(text: str) -> list[str]:
        texts = next(rounds)
        return [texts[0], text, *texts[2:]]

    return peers.SharedMemory(collect, Layout(len(handles), 1, 1), torch.device("cpu"), 2)


def test_memory_is_mapped_in_rank_order_and_given_back_with_the_object(calls: list[str]) -> None:
    memory = share([b"0".hex(), "", b"2".hex()])
    assert memory.peers.addresses.tolist()[:3] == [100, 7, 102] and memory.peers.rank == 1
    assert memory.find_missing() is None
    assert calls[0] == f"allocate {4 * peers.count_shared_words(3, 2)}" and calls[1:] == ["open 0", "open 2"]
    del memory
    gc.collect()
    assert calls[3:] == ["close 102", "close 100", "free 7"]


@pytest.mark.parametrize(
    ("handles", "said", "text"),
    [
        (["refused: cudaMalloc: out of memory", ""], None, "rank 0: .*cudaMalloc: out of memory"),
        ([b"3".hex(), ""], None, "rank 1: .*invalid device context"),
        ([b"0".hex(), ""], ["refused: cudaIpcOpenMemHandle: peer", ""], "rank 0: .*OpenMemHandle: peer"),
    ],
)
def test_a_refusal_of_any_rank_is_every_rank_s_error(
    calls: list[str], handles: list[str], said: list[str] | None, text: str
) -> None:
    with pytest.raises(RankError, match=text):
        share(handles, said)
    gc.collect()
    assert "free 7" in calls  # nothing is lost
