"""Memory that is refused is one error: what did not fit, and what makes it smaller."""

import errno

import pytest
import torch

from saccade.api.llm import LLM
from saccade.base.memory import naming_memory
from saccade.engine.params import SamplingParams
from saccade.errors import MemoryRefusedError

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"
REFUSALS = {
    "Python": MemoryError(),
    "a CPU": RuntimeError(CPU),
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"),
    "pinned memory": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("saccade.api.loading.load.load", "the weights .*larger device"),
        ("saccade.api.loading.load.build_model", "the model on cpu .*fewer cache_tokens"),
        (
            "saccade.api.loading.load.allocate_cache",
            r"the cache of [\d,]+ tokens \([\d,]+ bytes on cpu\) .*--cache-tokens",
        ),
        ("saccade.engine.engine.Buffers", "the buffers of a step .*max_requests"),
    ],
)
def test_an_allocation_that_is_refused_says_what_it_was_for(
    kind: str, place: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise REFUSALS[kind]

    monkeypatch.setattr(place, refuse)
    with pytest.raises(MemoryRefusedError, match=f"^no memory for {what}") as refused:
        LLM(device="cpu", cache_tokens=64)
    assert "enforce fail" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_step_that_does_not_fit_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(device="cpu", cache_tokens=256)
    plain = llm.engine._choose

    def refuse(*_: object) -> None:
        raise RuntimeError(CPU)

    monkeypatch.setattr(llm.engine, "_choose", refuse)
    with pytest.raises(
        MemoryRefusedError,
        match=r"a step's activations.*\(can't allocate memory: you tried to allocate 99 bytes\).*max_batch_tokens",
    ):
        llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    monkeypatch.setattr(llm.engine, "_choose", plain)
    assert llm.generate([1, 2, 3], SamplingParams(max_tokens=2))[0].token_ids


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("shape mismatch"), OSError(errno.EIO, "I/O error")):
        with pytest.raises(type(error), match="mismatch|I/O"), naming_memory("x", "y"):
            raise error
