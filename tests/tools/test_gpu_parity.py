"""tools/gpu_parity on a CPU: equal models have no difference, and those that are seen are the ones that are there."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saccade.api.llm import LLM
from saccade.engine.params import SamplingParams
from saccade.kernels.types import Norm, StreamMixer
from saccade.models.glm5_next.gpu import FlashGpu
from saccade.models.glm5_next.operations import FlashReference
from saccade.ops.interface import Moe
from tools.gpu_parity import alone
from tools.gpu_parity.compare import Part, count_over, find_bars, judge, summarise
from tools.gpu_parity.measure import cut_groups, draw_prompts, measure, measure_drafts
from tools.gpu_parity.runs import write_input
from tools.gpu_parity.shaken import run, shake

SELECTIONS = [
    f"{way}, selection, {kind}"
    for way in ("prefill", "decode")
    for kind in ("each layer on the reference's input", "end to end")
]

PART = {
    "tokens": 66743,
    "largest, selection given": 0.0,
    "over the bar": 0,
    "largest, experts and cached rows given too": 0.0,
    "other experts, all else given": 0,
    "over the bar of these": 0,
}


@pytest.fixture(scope="module")
def reference() -> LLM:
    return LLM(device="cpu")


def test_a_model_equals_itself(reference: LLM) -> None:
    prompts = draw_prompts(reference, 2, 80)
    result = measure(reference, reference, prompts, 3)
    assert all(judge(result).values()) and result["lengths"] == [len(prompt) for prompt in prompts]
    assert [result[way]["tokens"] for way in ("prefill", "decode")] == [sum(map(len, prompts)) - 2, 2 * 2]
    assert all(result[way]["largest of all"] == 0 for way in ("prefill", "decode"))
    assert all(result[name]["missed_mass"] == [0.0] * 4 and result[name]["tokens"] > 0 for name in SELECTIONS)
    assert all(result[way]["other experts, all else given"] == 0 for way in ("prefill", "decode"))
    assert all(result[way]["its prompt, token"] == [0, 0] for way in ("prefill", "decode"))
    assert measure_drafts(reference, reference, [prompts[0][:12]])["alike"] == 1.0


def test_bars_follow_the_setting(reference: LLM) -> None:
    """Another rounding of a prompt is beyond the bars of "exact", and within those of its own setting."""
    result = measure(reference, LLM(device="cpu", activations="bf16"), draw_prompts(reference, 2, 260)[1:], 3)
    assert result["prefill"]["largest, experts and cached rows given too"] > find_bars("exact")["all_given"]
    assert not judge(result)["a: but for few that the reference does not settle"]
    assert judge(result, find_bars("bf16"))["a: but for few that the reference does not settle"]
    assert all(find_bars("fp8")[name] >= value for name, value in find_bars("bf16").items())


def test_another_rounding_of_keys_is_seen_in_what_is_selected(reference: LLM) -> None:
    """Given the selections, keys make no difference."""
    result = measure(reference, LLM(device="cpu", index_cache="fp8"), draw_prompts(reference, 2, 80)[1:], 3)
    assert result["prefill"]["largest, selection given"] == 0 < result["prefill"]["largest of all"]
    assert all(max(result[name]["missed_mass"]) > 1e-3 for name in SELECTIONS)
    assert all(max(result[name]["most_of_a_token"]) > max(result[name]["missed_mass"]) for name in SELECTIONS)
    assert not judge(result)["b: missed attention mass"] and judge(result)["d: repeats itself"]


def choose_other_experts(llm: LLM) -> None:
    for layer in llm.model.layers:
        if isinstance(layer.mlp, Moe):
            layer.mlp.routing.bias[0] += 0.3


def cache_other_rows(llm: LLM) -> None:
    for layer in llm.model.layers:
        layer.attention.kv_a_norm.weight.mul_(1.5)


@pytest.mark.parametrize("change", [None, choose_other_experts, cache_other_rows])
def test_other_experts_and_rows_that_are_cached_otherwise_are_told_from_the_rest(
    reference: LLM, change: Callable[[LLM], None] | None
) -> None:
    other = LLM(device="cpu")
    if change is not None:
        change(other)
    part, holds = measure(reference, other, draw_prompts(reference, 1, 80), 3)["prefill"], change is None
    assert part["largest, experts and cached rows given too"] < 1e-6  # a bias takes part in the choice only
    assert (part["largest, selection given"] < 1e-6) == holds
    if change is not cache_other_rows:
        assert (part["other experts, all else given"] == 0) == holds
    if change is not choose_other_experts:
        assert (part["over the bar"] == 0) == holds
    assert judge_log_probs(part) == [holds, holds]


@pytest.mark.parametrize(
    "found,holds",
    [
        ({}, [True, True]),
        ({"over the bar": 2, "largest, selection given": 0.1}, [False, True]),
        ({"over the bar": 3, "largest, selection given": 0.03}, [False, False]),
        ({"over the bar of these": 3}, [True, False]),
        ({"over the bar": 1, "tokens": 3150}, [True, False]),
        ({"largest, selection given": 0.11}, [False, False]),
        ({"largest, selection given": math.nan}, [False, False]),
        ({"largest, experts and cached rows given too": 0.001}, [True, True]),
        ({"largest, experts and cached rows given too": 0.002}, [True, False]),
        ({"other experts, all else given": 66}, [True, True]),
        ({"other experts, all else given": 67}, [False, True]),
    ],
)
def test_every_token_is_held_or_all_but_few(found: dict[str, float], holds: list[bool]) -> None:
    assert judge_log_probs(PART | found) == holds


def test_what_is_no_number_is_above_every_bar() -> None:
    numbers, no, yes = torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    part = summarise([Part(numbers, torch.tensor([0.0, math.nan, 0.0]), numbers, numbers * math.nan, yes, yes)])
    assert (part["over the bar"], part["over the bar of these"]) == (1, 3)
    assert judge_log_probs(part) == [False, False] and count_over(numbers[no]) == 0


def test_a_model_that_is_shaken_moves_little(reference: LLM) -> None:
    """With what it selects at rest, and the same for the same seed."""
    prompt = draw_prompts(reference, 2, 80)[1]
    before = run(reference, prompt)
    first, again = (shake(reference, prompt, [0, 1]) for _ in range(2))
    assert first.shape == (2, len(prompt) - 1) and first.equal(again) and not first[0].equal(first[1])
    assert 0 < first.mean() < 1e-5 and first.max() < 2e-2
    assert all(a.equal(b) for a, b in zip(before, run(reference, prompt), strict=True))  # it stands still again


def judge_log_probs(part: dict[str, float]) -> list[bool]:
    """Of every token; but for few."""
    rest = {"x, the reference's input": {"missed_mass": [0.0]}, "greedy": {"texts": 1, "parted": []}, "repeats": {}}
    return [holds for name, holds in judge(rest | {"prefill": part, "decode": part}).items() if name.startswith("a: ")]


def test_a_text_that_parts_within_its_answer_must_be_a_near_tie() -> None:
    result = {"prefill": PART, "decode": PART, "the reference's input": {"missed_mass": [0.0]}, "repeats": {"a": True}}
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


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flash_models import add_mtp, write_flash

    folder = tmp_path_factory.mktemp("flash")
    write_flash(folder)
    add_mtp(folder)
    return folder


def test_a_family_with_streams_and_states_equals_itself(flash: Path) -> None:
    """Two texts at a time, of which each step has states; no tokenizer: tokens by chance."""
    one, other = (LLM(flash, device="cpu", dtype="float32", prefix_cache=False) for _ in range(2))
    prompts = draw_prompts(one, 3, 50)
    assert [len(prompt) for prompt in prompts] == [40, 50, 50]
    result = measure(one, other, prompts, 3)
    assert all(judge(result).values()), judge(result)
    assert all(result[way]["largest of all"] == 0 for way in ("prefill", "decode"))
    assert result["prefill"]["largest, experts and cached rows given too"] < 1e-5  # another shape of a product's input
    assert all(result[name]["missed_mass"] == [0.0] * len(result[name]["missed_mass"]) for name in SELECTIONS)
    assert measure_drafts(one, other, [prompts[0][:12]])["alike"] == 1.0


def test_other_states_are_seen(flash: Path) -> None:
    """With rows, experts and selections given."""
    one, other = (LLM(flash, device="cpu", dtype="float32", prefix_cache=False) for _ in range(2))
    for layer in other.model.layers:
        if hasattr(layer.block, "recurrence"):
            layer.block.recurrence.delta.decay.mul_(1.05)
    part = measure(one, other, draw_prompts(one, 1, 40), 3)["prefill"]
    assert part["largest, experts and cached rows given too"] > 1e-4


def test_a_family_with_streams_is_shaken(flash: Path) -> None:
    llm = LLM(flash, device="cpu", dtype="float32", prefix_cache=False)
    prompt = draw_prompts(llm, 2, 60)[1]
    moved = shake(llm, prompt, [0, 0, 1])
    assert moved[0].equal(moved[1]) and not moved[0].equal(moved[2]) and 0 < moved.mean() < 1e-4


@pytest.mark.parametrize("tokens", [1, 5])
def test_kernels_begin_at_the_streams_of_the_reference(tokens: int) -> None:
    """What a block reads of them, and what is mixed from them behind it."""
    dice, n, hidden = torch.Generator().manual_seed(tokens), 4, 32

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice)

    norm, numbers, part = Norm(draw(hidden).abs(), 1e-5), draw(tokens, n, hidden), draw(tokens, hidden)
    mixer = StreamMixer((draw(n * n + 2 * n, n * hidden) / 12).bfloat16(), draw(24), draw(3).abs(), n, 20, 1e-6, 1e-5)
    found = []
    for ops in (FlashReference(), FlashGpu()):
        x = write_input(SimpleNamespace(ops=ops), torch.arange(tokens), numbers, norm)  # type: ignore[arg-type]
        entered = ops.enter(x, mixer, norm)
        left = ops.merge(ops.add_over_ranks(entered, part, norm))
        found.append((ops.normalize(entered, norm), ops.normalize(left, norm)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Served:
    """Gives the second of several prompts another token than alone."""

    def encode(self, prompt: str) -> list[int]:
        return [0] * len(prompt)

    def generate(self, prompts: Any, params: SamplingParams) -> list[Any]:
        is_one = isinstance(prompts, str)
        texts = [[1, 2, 3] for _ in ([prompts] if is_one else prompts)]
        if not is_one and params.ignore_eos:
            texts[1] = [1, 9, 3]
        top = SimpleNamespace(top=((2, -0.5), (9, -0.75)))
        return [SimpleNamespace(token_ids=text, logprobs=[top] * 3) for text in texts]


def test_texts_that_depend_on_others_are_found() -> None:
    found = alone.compare_alone(Served(), ["a", "bc", "d"], 3, 3)  # type: ignore[arg-type]
    assert found == alone.Alone(3, [alone.Parted(1, 2, 3, 1, 0.25)])


def test_rounded_texts_do_not_depend_on_others(capsys: pytest.CaptureFixture[str]) -> None:
    alone.main(["--device", "cpu", "--prompts", "3", "--together", "3", "--tokens", "4", "--activations", "fp8"])
    assert "3 answers are the same; of texts of 4 tokens 0 part" in capsys.readouterr().out
