"""The probe of arrangements, on the bundled checkpoint: what must be equal is, and what must differ is seen."""

import pytest
import torch

from saccade.checkpoint.index import Index
from saccade.checkpoint.open import bundled_path, open_model
from saccade.config import ModelConfig
from saccade.eval.arrangements import ARRANGEMENTS, Arrangement, Projection, arranged, round_to_fp8
from saccade.eval.indexers import read_projections
from saccade.eval.probe import Difference, Spy, probe
from saccade.inspect.findings import UPCAST_BOUND, Upcast
from saccade.kernels.matrix import Matrix
from saccade.model.transformer import Transformer
from saccade.plan import make_plan
from saccade.weights import load

TOKENS = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(0)).tolist()  # more than one step


@pytest.fixture(scope="module")
def opened() -> tuple[ModelConfig, Index]:
    return open_model(bundled_path())


@pytest.fixture(scope="module")
def read(opened: tuple[ModelConfig, Index]) -> tuple[dict[int, Projection], list[Upcast]]:
    return read_projections(*opened, "cpu")


def compare(
    opened: tuple[ModelConfig, Index], projections: dict[int, Projection], *others: Arrangement
) -> list[Difference]:
    config, index = opened
    spy = Spy()
    model = Transformer(config, load(make_plan(config, index, dtype="float32", mtp=False)), spy)  # type: ignore[arg-type]
    return probe(model, spy, projections, [ARRANGEMENTS[0], *others], [(TOKENS, 690)], [True], "cpu")


def forget_scale(x: torch.Tensor, p: Projection) -> torch.Tensor:
    return ARRANGEMENTS[0].project(x, p._replace(wk=Matrix(p.wk.data.float())))


def test_the_yardstick_equals_itself_and_the_others_are_near(
    opened: tuple[ModelConfig, Index], read: tuple[dict[int, Projection], list[Upcast]]
) -> None:
    same, fused, separate, fp8_keys, lost = compare(
        opened, read[0], ARRANGEMENTS[0], *ARRANGEMENTS[1:], Arrangement("scale lost", forget_scale)
    )[1:]
    assert same.log_prob_largest == 0 and same.recall == [1.0] * len(read[0]) and max(same.missed_mass) == 0
    for layer in read[0]:
        assert 1 > fused.recall[layer] > separate.recall[layer] > lost.recall[layer]
        assert fused.recall[layer] > fp8_keys.recall[layer]
        assert 0 < fused.missed_mass[layer] < separate.missed_mass[layer] < lost.missed_mass[layer]
    assert fused.recall[0] > 0.97 and lost.recall[0] < 0.9  # of 16 selected among up to 700


def test_an_arrangement_ends_with_its_context(
    opened: tuple[ModelConfig, Index], read: tuple[dict[int, Projection], list[Upcast]]
) -> None:
    config, index = opened
    model = Transformer(config, load(make_plan(config, index, dtype="float32", mtp=False)))
    indexer = model.layers[0].attention.indexer
    assert indexer is not None
    before = dict(vars(indexer))
    with arranged(indexer, read[0][0], ARRANGEMENTS[3]), arranged(indexer, read[0][0], ARRANGEMENTS[1]):
        assert "project" in vars(indexer)
    assert vars(indexer) == before


def test_upcasts_say_what_the_scales_are(read: tuple[dict[int, Projection], list[Upcast]]) -> None:
    for upcast in read[1]:
        assert upcast.is_power_of_two and upcast.rounding == 0.0
        assert upcast.column_blocks >= 3 and upcast.largest_scale / upcast.least_scale >= 2**6
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
