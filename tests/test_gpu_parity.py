"""tools/gpu_parity on a CPU: equal models have no difference, and those that are seen are the ones that are there."""

import pytest
import torch

from saccade.kernels.operands import write
from saccade.llm import LLM
from tools.gpu_parity import rounding
from tools.gpu_parity.compare import judge
from tools.gpu_parity.measure import cut_groups, draw_prompts, measure, measure_drafts

SELECTIONS = [
    f"{way}, selection, {kind}"
    for way in ("prefill", "decode")
    for kind in ("each layer on the reference's input", "end to end")
]


@pytest.fixture(scope="module")
def reference() -> LLM:
    return LLM(device="cpu")


def test_a_model_equals_itself(reference: LLM) -> None:
    prompts = draw_prompts(reference, 2, 150)
    result = measure(reference, reference, prompts, 3)
    assert all(judge(result).values()) and result["lengths"] == [len(prompt) for prompt in prompts]
    assert [result[way]["tokens"] for way in ("prefill", "decode")] == [sum(map(len, prompts)) - 2, 2 * 2]
    assert all(result[way]["largest of all"] == 0 for way in ("prefill", "decode"))
    assert all(result[name]["missed_mass"] == [0.0] * 4 and result[name]["tokens"] > 0 for name in SELECTIONS)
    assert measure_drafts(reference, reference, prompts[:1])["alike"] == 1.0


def test_another_rounding_of_keys_is_seen_in_what_is_selected(reference: LLM) -> None:
    """Given the selections, keys make no difference."""
    result = measure(reference, LLM(device="cpu", index_cache="fp8"), draw_prompts(reference, 2, 150)[1:], 3)
    assert result["prefill"]["largest, selection given"] == 0 < result["prefill"]["largest of all"]
    assert all(max(result[name]["missed_mass"]) > 1e-3 for name in SELECTIONS)
    assert all(max(result[name]["most_of_a_token"]) > max(result[name]["missed_mass"]) for name in SELECTIONS)
    assert not judge(result)["b: missed attention mass"] and judge(result)["d: repeats itself"]


@pytest.mark.parametrize("rounded", [(), ("o_proj",), ("experts.down",)])
def test_rounding_is_seen_and_nothing_else(rounded: tuple[str, ...]) -> None:
    said: list[str] = []
    most = rounding.measure([0], rounding.SHORTEST, rounded, "bf16", said.append)
    assert len(said) == 1 and (1e-6 < most < 1e-1 if rounded else most == 0)


@pytest.mark.parametrize("asked", [["--prompts", "0"], ["--longest", "9"], ["--rounded", "wk"]])
def test_what_cannot_be_rounded_is_said_in_one_line(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        rounding.main(asked)
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err


def test_eleven_bits_are_those_of_the_kernels() -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 10, 7)[:, None]
    half = write(x, half=1).half
    assert rounding.keep_11_bits(x).equal(half.high.float() * half.unit[:, None])


def test_a_text_that_parts_within_its_answer_must_be_a_near_tie() -> None:
    part = {"largest, selection given": 0.0}
    result = {"prefill": part, "decode": part, "the reference's input": {"missed_mass": [0.0]}, "repeats": {"a": True}}
    for gap, within, texts, holds in (
        (0.02, True, 50, False),
        (0.02, False, 50, True),
        (0.005, True, 50, True),
        (0.005, True, 49, False),
    ):
        parted = [{"gap": gap, "is_within_answer": within}]
        assert judge(result | {"greedy": {"texts": texts, "parted": parted}})["c: greedy text"] == holds


def test_fifty_prompts_are_decoded_one_to_sixteen_at_a_time() -> None:
    assert [len(group) for group in cut_groups([[1]] * 50)] == [1, 2, 16, 4, 11, 16]
