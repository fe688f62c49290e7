"""The published storage layouts: each loads to what an independent decode says, bit for bit, or is refused by name.

The layouts are in tests/headers/*.txt. Small checkpoints are written and decoded by independent_codec.py, fused by
fused_parameters.py.
"""

from pathlib import Path

import pytest
import torch
from fused_parameters import fuse, fuse_flash
from independent_codec import Made, make, write
from layouts import Layout, config_of, read_layouts
from torch import Tensor

from saccade.checkpoint.open import open_model
from saccade.kernels.reference import decode
from saccade.kernels.types import Matrix
from saccade.plan import Plan, make_plan
from saccade.weights.loader import load

LAYOUTS = read_layouts()
LOADED = [name for name, layout in LAYOUTS.items() if not layout.is_refused]


def plan_of(root: Path, **kwargs: object) -> Plan:
    return make_plan(*open_model(root), **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Made]]:
    """Checkpoints of the layouts that have been asked for."""
    return {}


def written(
    name: str, small: dict[str, tuple[Path, Made]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Made]:
    if name not in small:
        layout = LAYOUTS[name]
        made = make(layout, config_of(layout, True))
        root = write(tmp_path_factory.mktemp(name), config_of(layout, True), made.tensors)
        small[name] = root, made
    return small[name]


def expected_of(layout: Layout, made: Made) -> dict[str, Tensor]:
    config, copies = config_of(layout, True), layout.model == "deepseek"
    if layout.model == "flash":
        return fuse_flash(config, lambda name: torch.from_numpy(made.values[name]))
    return fuse(config, lambda name: torch.from_numpy(made.values[name]), copies)


def loaded_values(plan: Plan) -> dict[str, tuple[Tensor, str]]:
    """f32 values of every loaded parameter, and what it is held in."""
    weights, values = load(plan), {}
    for param in plan.params:
        held = plan.stored[param.name]
        if held.encoding is not None:
            matrix = weights.matrix(param.name)
            assert matrix.scale is not None
            values[param.name] = decode(matrix), held.encoding.name
        else:
            values[param.name] = decode(Matrix(weights.take(param.name))), held.dtype
    weights.finish()
    return values


def test_there_are_25_layouts() -> None:
    assert [int(name[:2]) for name in LAYOUTS] == list(range(1, 26))
    assert [name for name in LAYOUTS if name not in LOADED] == ["15-awq", "22-gguf"]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", LOADED)
def test_a_layout_loads_to_an_independent_decode_bit_for_bit(
    name: str, dtype: str, small: dict[str, tuple[Path, Made]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, made = written(name, small, tmp_path_factory)
    expected, found = expected_of(LAYOUTS[name], made), loaded_values(plan_of(root, dtype=dtype))
    assert found.keys() == expected.keys()
    for param, (values, held) in found.items():
        wanted = expected[param].bfloat16().float() if held == "BF16" else expected[param]
        assert torch.equal(values.view(torch.int32), wanted.view(torch.int32)), (param, held)
        assert dtype == "auto" or held == "F32"
    fused = [param for param in found if param.endswith(("wk_weights_proj", "wk_gate_weights_proj"))]
    assert len(fused) == sum(matrix.endswith("indexer.wk.weight") for matrix in made.values) > 1
    assert {found[param][1] for param in fused} == {"BF16" if dtype == "auto" else "F32"}


KEPT = {  # what routed experts are held in on the device, gate and up, then down, where that is not BF16
    "01-fp8-deepseek": (None, "FP8 128x128"),  # up_proj begins at row 192, inside a block
    "02-fp8-glm": (None, "FP8 128x128"),
    "04-nvfp4-modelopt": ("NVFP4", "NVFP4"),
    "05-nvfp4-everywhere": ("NVFP4", "NVFP4"),
    "06-nvfp4-experts-only": ("NVFP4", "NVFP4"),
    "07-nvfp4-fp8-compressed-tensors": ("NVFP4 compressed-tensors", "NVFP4 compressed-tensors"),
    "08-nvfp4-quark": ("NVFP4", "NVFP4"),
    "09-mxfp4-quark": ("MXFP4", "MXFP4"),
    "10-mxfp4-fp8-per-channel": ("MXFP4", "MXFP4"),
    "11-fp8-renamed": (None, "FP8 128x128"),
    "12-mxfp8-nvfp4": ("NVFP4", "NVFP4"),
    "13-int4-fp8-compressed-tensors": ("INT4 g128 compressed-tensors",) * 2,
    "14-mxfp4-fp8-compressed-tensors": ("MXFP4", "MXFP4"),
    "16-nvfp4-fp8-by-projection": ("NVFP4", "FP8 per channel"),
    "17-w4afp8": ("INT4 g128 W4AFP8",) * 2,
    "18-int8": ("INT8 per channel",) * 2,
    "19-fp8-packed-ue8m0": ("FP8 1x128 packed UE8M0",) * 2,
    "20-fp8-bf16-indexer": (None, "FP8 128x128"),
    "21-mxfp8-hunyuan": ("MXFP8", "MXFP8"),
    "23-fp8-flash": (None, "FP8 128x128"),
    "24-nvfp4-flash-compressed-tensors": ("NVFP4 compressed-tensors",) * 2,
    "25-nvfp4-flash-modelopt": ("NVFP4", "NVFP4"),
}


@pytest.mark.parametrize("name", LOADED)
def test_routed_experts_stay_in_the_codes_of_their_file(
    name: str, small: dict[str, tuple[Path, Made]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = plan_of(written(name, small, tmp_path_factory)[0])
    x = "model.layers.1.mlp.experts."
    held = tuple(plan.stored[x + leaf].encoding for leaf in ("gate_up_proj", "down_proj"))
    assert tuple(e and e.name for e in held) == KEPT.get(name, (None, None))
    for other, stored in plan.stored.items():
        if stored.encoding is not None and ".mlp.experts." not in other:
            assert stored.encoding.name == "FP8 128x128", other  # the only codes of other matrices
