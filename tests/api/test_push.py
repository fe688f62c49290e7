"""New weights into a running engine: proven first, whole or not at all, at the same addresses, never a mixture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from announcements import announce
from small_checkpoints import small_config, small_tensors, write_small
from torch import Tensor

from saccade.api.llm import LLM
from saccade.api.push import Push
from saccade.engine.params import SamplingParams
from saccade.errors import LoadError, PlanError, RequestError
from saccade.weights.loader import Loader

PROMPTS = [[(7 * i + 3 * p) % 320 for i in range(30)] for p in range(4)]  # longer than index_topk, 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tensors() -> list[dict[str, Tensor]]:
    """Two sets of weights of one model: those that run at first, and those that are pushed."""
    return [small_tensors(small_config(), seed, mtp_copies=False) for seed in (0, 1)]


@pytest.fixture(scope="module")
def roots(tensors: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_small(folder / str(i), small_config(), t) for i, t in enumerate(tensors)]


@pytest.fixture
def llm(roots: list[Path]) -> Iterator[LLM]:
    yield LLM(roots[0], "cpu")


@pytest.fixture(scope="module")
def answers(roots: list[Path]) -> list[list[list[int]]]:
    """What each set of weights answers, from a fresh start."""
    found = [ask(LLM(root, "cpu")) for root in roots]
    assert found[0] != found[1]
    return found


def ask(llm: LLM) -> list[list[int]]:
    return [made.token_ids for made in llm.generate(PROMPTS, GREEDY)]


def feed(push: Push, tensors: dict[str, Tensor], seed: int = 0, count: int | None = None) -> None:
    """In a random order, in pieces of rows, from a buffer that is overwritten after each call."""
    names = list(tensors)
    dice = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(names), generator=dice).tolist()[:count]:
        tensor = tensors[names[i]]
        cut = max(1, len(tensor) // 2)
        for first in range(0, len(tensor), cut):
            buffer = tensor[first : first + cut].clone()
            push.feed(names[i], buffer, first)
            buffer.view(torch.uint8).fill_(0xFF)


@pytest.mark.parametrize("staged", [True, False])
def test_pushed_weights_run_at_the_same_addresses(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]], staged: bool
) -> None:
    addresses = {name: t.data_ptr() for name, t in llm._loaded.held.items()}
    assert ask(llm) == answers[0]
    for turn, i in enumerate((1, 0, 1)):
        with llm.push(announce(tensors[i]), staged) as push:
            feed(push, tensors[i], seed=turn)
            push.finish()
        assert ask(llm) == answers[i]
    assert {name: t.data_ptr() for name, t in llm._loaded.held.items()} == addresses


@pytest.mark.parametrize("staged", [True, False])
def test_pages_of_old_weights_are_not_found(
    llm: LLM, tensors: list[dict[str, Tensor]], roots: list[Path], staged: bool
) -> None:
    brief = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    prompt = [(7 * i) % 320 for i in range(130)]
    assert [llm.generate(prompt, brief)[0].cached_tokens for _ in range(2)] == [0, 128]
    with llm.push(announce(tensors[1]), staged) as push:
        feed(push, tensors[1])
        push.finish()
    first, second = (llm.generate(prompt, brief)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert first.token_ids == second.token_ids == LLM(roots[1], "cpu").generate(prompt, brief)[0].token_ids


def test_every_parameter_is_the_new_one(llm: LLM, tensors: list[dict[str, Tensor]], roots: list[Path]) -> None:
    with llm.push(announce(tensors[1])) as push:
        feed(push, tensors[1])
        push.finish()
    fresh = LLM(roots[1], "cpu")
    assert llm._loaded.held.keys() == fresh._loaded.held.keys()
    for name, tensor in llm._loaded.held.items():
        assert torch.equal(tensor.view(torch.uint8), fresh._loaded.held[name].view(torch.uint8)), name


WK = "model.layers.1.self_attn.indexer.wk.weight"
REFUSED = {
    "a scale is missing": ({WK + "_scale_inv": None}, WK),
    "a tensor is missing": ({"model.norm.weight": None}, "model.norm.weight"),
    "a tensor is not known": ({"model.layers.1.extra.weight": ("BF16", (4,))}, "extra"),
    "a shape is another": ({"lm_head.weight": ("BF16", (320, 128))}, "lm_head.weight"),
    "codes without their dtype": ({WK: ("I8", (64, 256))}, WK),
    "a matrix that runs in FP8 comes in BF16": (
        {
            "model.layers.1.self_attn.o_proj.weight": ("BF16", (256, 256)),
            "model.layers.1.self_attn.o_proj.weight_scale_inv": None,
        },
        "o_proj",
    ),
}


# What cannot be proven is refused before anything is staged or written: one case says so of both.
@pytest.mark.parametrize(("case", "staged"), [*((case, True) for case in REFUSED), ("a scale is missing", False)])
def test_a_push_that_cannot_be_proven_changes_nothing(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]], case: str, staged: bool
) -> None:
    changes, name = REFUSED[case]
    with pytest.raises(PlanError) as refused:
        llm.push(announce(tensors[1], **changes), staged)
    assert name in str(refused.value) and refused.value.problems
    assert ask(llm) == answers[0]
    llm.push(announce(tensors[1]), staged).abandon()  # and the next one is not in its way


def test_a_push_that_is_not_finished_changes_nothing_when_staged(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]]
) -> None:
    with llm.push(announce(tensors[1]), staged=True) as push:
        feed(push, tensors[1], count=40)
        assert ask(llm) == answers[0]  # the old weights go on serving meanwhile
        with pytest.raises(LoadError, match="have not come"):
            push.finish()
        assert ask(llm) == answers[0]
    assert ask(llm) == answers[0]
    with pytest.raises(LoadError, match="has ended"):
        push.feed(WK, tensors[1][WK])


def test_an_interrupted_push_in_place_is_refused_until_a_whole_one_has_come(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]]
) -> None:
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), llm.push(announce(tensors[1]), staged=False) as push:
        feed(push, tensors[1], count=40)
        with pytest.raises(RequestError, match="incomplete"):
            ask(llm)
        raise Interrupted
    for _ in range(2):
        with pytest.raises(RequestError, match=r"weights are incomplete: a push of \d+ tensors in place was abandoned"):
            ask(llm)
        with pytest.raises(RequestError, match="incomplete"):
            llm.score(PROMPTS[0])
        with pytest.raises(RequestError, match="incomplete"):
            llm.stream(PROMPTS[0])
    with pytest.raises(PlanError):
        llm.push(announce(tensors[1], **{WK: None}))
    with pytest.raises(RequestError, match="incomplete"):  # a refused push heals nothing
        ask(llm)
    with llm.push(announce(tensors[1]), staged=True) as push:
        feed(push, tensors[1])
        push.finish()
    assert ask(llm) == answers[1]


@pytest.mark.parametrize("staged", [True, False])
def test_requests_under_way_end_on_the_weights_they_began_with(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]], staged: bool
) -> None:
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
    begun = [next(stream).token_ids for stream in streams]
    with llm.push(announce(tensors[1]), staged) as push:
        feed(push, tensors[1])
        push.finish()
    assert not llm.engine.jobs and llm.engine.scheduler.pages.free == llm.engine.scheduler.pages.count - 1
    told = [
        first + [t for piece in stream for t in piece.token_ids] for first, stream in zip(begun, streams, strict=True)
    ]
    assert told == answers[0]
    assert ask(llm) == answers[1]


def test_memory_decides_where_a_push_goes_and_it_is_printed(
    llm: LLM, tensors: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = llm.plan.device_bytes
    for free, where in ((2 * need, "staged beside the old weights"), (need, "in place")):
        monkeypatch.setattr("saccade.api.push.find_free_bytes", lambda _, free=free: free)
        with llm.push(announce(tensors[1])) as push:
            assert where in str(push) and push.is_staged == (where != "in place")


SPELLINGS = [
    (("bfloat16", (320, 256)), 'a dtype as safetensors spells it, like "BF16"$'),
    ((torch.float8_e4m3fn, (320, 256)), 'a dtype as safetensors spells it, like "F8_E4M3"$'),
    (("fp8", (320, 256)), 'a dtype as safetensors spells it, like "BF16" or "F8_E4M3"$'),
    (("BF16", (10**30,)), r"a shape of at most 16 counts whose product is below 2\^63, like \(64, 128\)$"),
    (("BF16", (2**40, 2**40)), r"a shape of at most 16 counts whose product is below 2\^63"),
    (("BF16", (1,) * 17), "a shape of at most 16 counts"),
    (("BF16", (-1, 256)), "a shape of at most 16 counts"),
]


@pytest.mark.parametrize(("spec", "wanted"), SPELLINGS)
def test_a_dtype_or_shape_that_is_none_is_told_how_it_is_written(llm: LLM, spec: Any, wanted: str) -> None:
    with pytest.raises(LoadError, match=f"^lm_head.weight is announced as .*; expected {wanted}") as error:
        llm.push({"lm_head.weight": spec})
    assert "\n" not in str(error.value) and len(str(error.value)) < 240


@pytest.mark.parametrize(
    "announced", [None, ["a"], {"a": "BF16"}, {"a": ("BF16", "ab")}, {"a": torch.ones(2)}, {3: ("BF16", (1,))}]
)
def test_what_is_no_announcement_is_one_clear_error(llm: LLM, announced: object) -> None:
    with pytest.raises(LoadError, match="expected a pair like|as a mapping of names|expected its name, a str"):
        llm.push(announced)  # type: ignore[arg-type]


def test_an_interrupted_drain_does_not_cost_the_push(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with llm.push(announce(tensors[1]), staged=True) as push:
        feed(push, tensors[1])
        with pytest.raises(LoadError, match="expected a torch tensor"):
            push.feed(WK, [1.0])  # type: ignore[arg-type]
        stream = llm.stream(PROMPTS[0], GREEDY)
        step = llm.engine.step
        monkeypatch.setattr(llm.engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            push.finish()
        monkeypatch.setattr(llm.engine, "step", step)
        push.finish()
    assert [t for piece in stream for t in piece.token_ids] == answers[0][0]
    assert ask(llm) == answers[1]


def test_rows_that_did_not_arrive_can_be_fed_again(
    llm: LLM, tensors: list[dict[str, Tensor]], answers: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with llm.push(announce(tensors[1])) as push:
        with monkeypatch.context() as broken:
            broken.setattr(Loader, "_place", fail)
            with pytest.raises(MemoryError):
                push.feed("model.norm.weight", tensors[1]["model.norm.weight"])
        with pytest.raises(LoadError, match="with its numbers"):
            push.feed(WK, tensors[1][WK].to("meta"))
        feed(push, tensors[1])
        push.finish()
    assert ask(llm) == answers[1]


def test_one_push_at_a_time(llm: LLM, tensors: list[dict[str, Tensor]]) -> None:
    with llm.push(announce(tensors[1]), staged=True), pytest.raises(LoadError, match="under way"):
        llm.push(announce(tensors[1]))
    llm.push(announce(tensors[1]), staged=True).abandon()
