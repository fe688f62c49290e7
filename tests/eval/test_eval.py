"""The probe of arrangements, on the bundled checkpoint: what must be equal is, and what must differ is seen."""

import math

import pytest
import torch

from saccade.checkpoint.index import Index
from saccade.checkpoint.open import bundled_path, open_model
from saccade.eval.arrangements import ARRANGEMENTS, CACHED_FP8, ArrangedReference, Arrangement, Projection, round_to_fp8
from saccade.eval.indexers import read_projections
from saccade.eval.probe import ProbeDifference, chunks_of, probe
from saccade.eval.tasks import draw_test
from saccade.inspect.findings import UPCAST_BOUND, Upcast
from saccade.kernels.types import Matrix
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.transformer import Transformer
from saccade.ops.interface import Residual
from saccade.ops.reference import Reference
from saccade.plan import make_plan
from saccade.text.tokenizer import Tokenizer
from saccade.weights.loader import load

PROBLEM = draw_test("recall", 0, 700)  # more than one step


@pytest.fixture(scope="module")
def opened() -> tuple[ModelConfig, Index]:
    return open_model(bundled_path())


@pytest.fixture(scope="module")
def read(opened: tuple[ModelConfig, Index]) -> tuple[dict[int, Projection], list[Upcast]]:
    return read_projections(*opened, "cpu")


def compare(
    opened: tuple[ModelConfig, Index], projections: dict[int, Projection], *others: Arrangement
) -> list[ProbeDifference]:
    config, index = opened
    model = Transformer(config, load(make_plan(config, index, dtype="float32", mtp=False)), Reference())
    tokens, answer = (encode(text) for text in (PROBLEM.prompt, PROBLEM.answer))
    asked = [(tokens + answer, len(tokens))]
    return probe(model, projections, [ARRANGEMENTS[0], *others], asked, [True], "cpu")


def encode(text: str) -> list[int]:
    tokenizer = Tokenizer.load(bundled_path())
    assert tokenizer is not None
    return tokenizer.encode(text)[1:]  # without <|begin|>


def forget_scale(x: torch.Tensor, p: Projection) -> torch.Tensor:
    return ARRANGEMENTS[0].project(x, p._replace(wk=Matrix(p.wk.data.float())))


def test_the_yardstick_equals_itself_and_the_others_are_near(
    opened: tuple[ModelConfig, Index], read: tuple[dict[int, Projection], list[Upcast]]
) -> None:
    no_numbers = Arrangement("no numbers", lambda x, p: ARRANGEMENTS[0].project(x, p) * torch.nan)
    same, fused, tensor_cores, separate, fp8, turned, lost, none = compare(
        opened, read[0], ARRANGEMENTS[0], *ARRANGEMENTS[1:], Arrangement("scale lost", forget_scale), no_numbers
    )[1:]
    assert math.isnan(none.log_prob_largest) and math.isnan(none.log_prob_mean) and none.exact == 0
    for exact in (same, fused):  # scales are powers of two, so BF16 holds the very numbers of fp32
        assert exact.log_prob_largest < 1e-5 and exact.exact == 1
        assert min(exact.recall) > 0.9999 and max(exact.missed_mass) < 1e-5
    assert max(tensor_cores.missed_mass) < 2e-3
    for layer in read[0]:
        assert 1 > tensor_cores.recall[layer] > separate.recall[layer] > 0.95 > lost.recall[layer]
        assert 0 < tensor_cores.missed_mass[layer] < separate.missed_mass[layer] < lost.missed_mass[layer]
        assert tensor_cores.missed_mass[layer] < min(fp8.missed_mass[layer], turned.missed_mass[layer]) < 0.1
    assert lost.exact == 0 and lost.log_prob_largest > 1


def test_the_fp8_cache_is_the_arrangement_that_rounds_numbers(
    opened: tuple[ModelConfig, Index], read: tuple[dict[int, Projection], list[Upcast]]
) -> None:
    """Same selections and same log-probabilities, to the last bit: the sums of differences are equal."""
    _, simulated, cached = compare(opened, read[0], ARRANGEMENTS[4], CACHED_FP8)
    assert simulated.log_prob_largest > 0 and max(simulated.missed_mass) > 0
    assert vars(cached) | {"name": ""} == vars(simulated) | {"name": ""}


def test_nothing_is_missed_where_every_token_is_seen(
    opened: tuple[ModelConfig, Index], read: tuple[dict[int, Projection], list[Upcast]]
) -> None:
    config, index = opened
    model = Transformer(config, load(make_plan(config, index, dtype="float32", mtp=False)), Reference())
    short = [(encode("Tom has 9 pens. How many?"), 5)]
    for found in probe(model, read[0], ARRANGEMENTS[:2], short, [True], "cpu"):
        assert found.recall == found.missed_mass == [None] * 4


def test_an_arrangement_is_of_the_layers_it_is_given(
    opened: tuple[ModelConfig, Index], read: tuple[dict[int, Projection], list[Upcast]]
) -> None:
    config, index = opened
    model = Transformer(config, load(make_plan(config, index, dtype="float32", mtp=False)), Reference())
    x = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0))
    arranged = ArrangedReference(model, {0: read[0][0]}, Arrangement("scale lost", forget_scale))
    for i, is_other in ((0, True), (1, False)):
        layer, norm = model.layers[i], model.layers[i].input_norm
        assert layer.attention.indexer is not None
        asked = Residual(x, norm), norm, [layer.attention.qkv_a_proj, layer.attention.indexer.projection]
        (low, key, weights), found = (ops.project(*asked) for ops in (model.ops, arranged))
        assert torch.equal(found[0], low) and torch.allclose(found[2], weights, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found[1], key, rtol=1e-4, atol=1e-5) != is_other


def test_upcasts_say_what_the_scales_are(read: tuple[dict[int, Projection], list[Upcast]]) -> None:
    for upcast in read[1]:
        assert upcast.is_power_of_two and upcast.rounding == 0.0
        assert upcast.column_blocks == 4 and upcast.scales >= 3 and upcast.largest_scale / upcast.least_scale >= 2**6
    assert UPCAST_BOUND == 2**-8


def test_fp8_vectors_have_one_power_of_two_scale() -> None:
    x = torch.randn(5, 3, 64) * torch.tensor([1e-6, 1.0, 1e4])[None, :, None]
    rounded = round_to_fp8(x)
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    codes = rounded / scale
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)
    big = x.abs() > 0.02 * x.abs().amax(-1, keepdim=True)
    big[:, 0] = False  # below the least scale everything may vanish
    assert ((rounded - x).abs() <= 2**-4 * x.abs())[big].all() and not torch.equal(rounded, x)


def test_steps_of_a_prompt_round_as_an_engine_s_do() -> None:
    """Up to its end, if it is long; an answer never does."""

    def see(prompt: int) -> list[tuple[int, bool]]:
        steps = chunks_of(range(700), "cpu", prompt)
        assert torch.cat([step.positions for step in steps]).tolist() == list(range(700))
        return [(len(step.tokens), step.rounds) for step in steps]

    assert see(0) == see(128) == [(512, False), (188, False)]
    assert see(600) == [(512, True), (88, True), (100, False)]
    assert see(700) == see(900) == [(512, True), (188, True)]
