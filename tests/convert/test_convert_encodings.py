"""Every encoding of the table is converted, not only the published one: wk and experts come out as they were loaded."""

from math import prod
from pathlib import Path

import pytest
import torch
from small_checkpoints import TORCH, small_config, small_tensors, write_small
from torch import Tensor
from whole_checkpoints import parameters_of, same, tensors_of

from saccade.checkpoint.encoding import ENCODINGS, Encoding
from saccade.checkpoint.open import open_model
from saccade.convert.changes import Mode
from saccade.convert.convert import convert
from saccade.errors import ContentsError
from saccade.inspect.contents import check_contents

DTYPES = TORCH | {"F16": torch.float16, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32}
EXPERTS, WK = ".experts.", "indexer.wk.weight"


def encode(given: dict[str, Tensor], e: Encoding, where: str) -> dict[str, Tensor]:
    """The matrices with `where` in their name as random codes and scales of an encoding."""
    dice = torch.Generator().manual_seed(5)
    out = {n: t for n, t in given.items() if where not in n}
    for name, t in given.items():
        if where not in name or name.endswith("_scale_inv"):
            continue
        shape = tuple(t.shape)
        codes = torch.randint(0, 100, (prod(e.codes_shape(shape)) * DTYPES[e.codes].itemsize,), generator=dice)
        codes = codes.to(torch.uint8).view(DTYPES[e.codes]).view(e.codes_shape(shape))
        scale_dtype, grid = DTYPES[e.scale_dtypes[0]], e.scale_shape(shape)
        if scale_dtype.is_floating_point:
            scale = torch.rand(grid, generator=dice).add(0.5).to(scale_dtype)
        else:  # exponents, around 2^0
            raw = torch.randint(120, 134, (prod(grid) * scale_dtype.itemsize,), generator=dice)
            scale = raw.to(torch.uint8).view(scale_dtype).view(grid)
        out[name + e.code_suffixes[0]], out[name + e.scale_suffixes[0]] = codes, scale
        if e.global_suffix:
            out[name + e.global_suffix] = torch.rand(1, generator=dice).add(0.5)
    return out


@pytest.mark.parametrize("e", ENCODINGS, ids=lambda e: e.name)
@pytest.mark.parametrize(("where", "mode"), [(WK, Mode("upcast", ("indexer.wk",))), (EXPERTS, Mode("bf16"))])
def test_each_encoding_comes_out_as_it_is_loaded(e: Encoding, where: str, mode: Mode, tmp_path: Path) -> None:
    config = small_config(num_hidden_layers=2, moe_intermediate_size=256, num_nextn_predict_layers=0)
    given = {n: t for n, t in small_tensors(config, mtp_copies=False).items() if "layers.2." not in n}
    write_small(tmp_path / "m", config, encode(given, e, where), lambda name: len(name) % 3)
    report = convert(tmp_path / "m", tmp_path / "out", mode)
    after = tensors_of(tmp_path / "out")
    assert {t.dtype for n, t in after.items() if where in n} == {torch.bfloat16}
    assert {n for n in after if where in n} == {n for n in given if where in n and n.endswith("weight")}
    assert same(parameters_of(tmp_path / "out", "auto"), parameters_of(tmp_path / "m", "auto")) or where == EXPERTS
    before, held = parameters_of(tmp_path / "m", "float32"), parameters_of(tmp_path / "out", "float32")
    for name, t in before.items():
        assert held[name].equal(t.bfloat16().float() if report.roundings and t.ndim > 1 else t), name


def test_codes_that_are_not_symmetric_are_refused(tmp_path: Path) -> None:
    e = next(e for e in ENCODINGS if e.code == "int8")
    config = small_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    given = {n: t for n, t in small_tensors(config, mtp_copies=False).items() if "layers.2." not in n}
    given = encode(given, e, WK)
    name = f"model.layers.0.self_attn.{WK}_offset"
    given[name] = torch.zeros(64, 1)
    given[name][3] = 1
    write_small(tmp_path / "m", config, given)
    with pytest.raises(ContentsError, match=f"offset: {name} .* is not zero, so its codes are asymmetric"):
        convert(tmp_path / "m", tmp_path / "out", Mode("upcast", ("indexer.wk",)))


SPOILED = {  # what is done to a scale, or a global scale
    "NaN": lambda t: t.view(-1)[-1:].fill_(torch.nan),
    "negative": lambda t: t.view(-1)[-1:].neg_(),
    "zero": lambda t: t.view(-1)[-1:].zero_(),
    "beyond BF16": lambda t: t.view(-1)[-1:].fill_(3e38),
}


@pytest.mark.parametrize("e", [e for e in ENCODINGS if e.scale_dtypes[0] in ("F32", "F8_E4M3")], ids=lambda e: e.name)
@pytest.mark.parametrize("how", SPOILED)
def test_unsound_scales_are_refused_in_every_encoding(how: str, e: Encoding, tmp_path: Path) -> None:
    """As `check --contents` refuses them; once they are gone, no check could tell."""
    config = small_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    given = {n: t for n, t in small_tensors(config, mtp_copies=False).items() if "layers.2." not in n}
    given = encode(given, e, WK)
    codes = given[f"model.layers.1.self_attn.{WK}{e.code_suffixes[0]}"]
    codes.view(torch.uint8)[-1] = 0xEE  # not zero, in any spelling
    name = f"model.layers.1.self_attn.{WK}{e.global_suffix or e.scale_suffixes[0]}"
    SPOILED[how](given[name])
    if e.divides and how == "beyond BF16":
        given[name].fill_(1e-38)
    root = write_small(tmp_path / "m", config, given)
    known = [(p.kind, p.name) for p in check_contents(*open_model(root)).problems]
    with pytest.raises(ContentsError) as error:
        convert(root, tmp_path / "out", Mode("upcast", ("indexer.wk",)))
    assert not (tmp_path / "out").exists() and len(known) == 1
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith("{}: {} ".format(*known[0]))
