"""Writing: FP8 blocks that decode to within half a step, files that the safetensors library reads, never half a checkpoint."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from saccade.checkpoint.index import INDEX_FILE, read_index
from saccade.checkpoint.write import published_fp8, quantize_blocks, write_checkpoint
from saccade.errors import CheckpointError

DICE = torch.Generator().manual_seed(0)


def uneven(rows, cols, block=(128, 128)):
    """Random numbers whose blocks differ in size by up to 2^12."""
    w = torch.randn(rows, cols, generator=DICE)
    shape = (-(-rows // block[0]), -(-cols // block[1]))
    size = torch.exp2(torch.rand(shape, generator=DICE) * 12 - 6)
    return w * size.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]


def decode(codes, scale, block=(128, 128)):
    full = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * full[: codes.shape[0], : codes.shape[1]]


SHAPES = [
    ((576, 200), (128, 128)),
    ((1, 1), (128, 128)),
    ((128, 128), (128, 128)),
    ((70, 33), (8, 16)),
    ((4100, 3), (128, 128)),
]


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_each_block_is_scaled_by_its_own_largest_value(shape, block, power_of_two):
    w = uneven(*shape, block)
    codes, scale = quantize_blocks(w, power_of_two, block)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            box = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = w[box].abs().max().double()
            exact = largest / 448
            if power_of_two:
                exact = torch.exp2(torch.ceil(torch.log2(exact)))
            assert scale[i, j].item() == pytest.approx(exact.item(), rel=1e-6)
            # e4m3 has 3 bits after the first: half a step is 1/16 relative, or 2^-10 of the scale near zero
            error = (codes[box].float() * scale[i, j] - w[box]).abs()
            assert (error <= torch.maximum(w[box].abs() / 16, scale[i, j] * 2.0**-10) * 1.0001).all()


@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_largest_numbers_decode_to_finite_ones_nearby(power_of_two):
    """A power of two that reaches 3.3e38 has a code that stands for 2^128, which is infinite."""
    largest = torch.finfo(torch.bfloat16).max
    w = torch.tensor([1.0, 0.999, 0.98, 0.97, 0.94, 0.5, 2.0**-6]).repeat_interleave(128)[None] * largest
    codes, scale = quantize_blocks(torch.cat([w, -w]), power_of_two)
    decoded = decode(codes, scale).bfloat16().float()
    assert decoded.isfinite().all()
    assert ((decoded[0] - w[0]).abs() <= w[0] / 16).all() and torch.equal(decoded[0], -decoded[1])
    if power_of_two:  # only those that have no finite code nearer are rounded down
        assert codes[0, ::128].float().tolist() == [240.0, 240.0, 240.0, 240.0, 240.0, 256.0, 256.0]
    # A small number beside large ones is not touched.
    codes, scale = quantize_blocks(torch.tensor([[largest, 2.0**119]]), power_of_two)
    assert decode(codes, scale)[0, 1].item() == pytest.approx(2.0**119, rel=1 / 16)


def test_power_of_two_scales_hold_their_own_codes_exactly():
    w = uneven(300, 300)
    codes, scale = quantize_blocks(w)
    assert torch.frexp(scale).mantissa.eq(0.5).all() and scale.unique().numel() > 3
    again, scale_again = quantize_blocks(decode(codes, scale))
    assert decode(again, scale_again).equal(decode(codes, scale))


@pytest.mark.parametrize("power_of_two", [True, False])
def test_blocks_at_the_edge_of_the_format(power_of_two):
    block = torch.ones(128, 128)
    w = torch.cat([0 * block, 448 * block, 449 * block, 1e-44 * block, 3e38 * block], 1)
    codes, scale = quantize_blocks(w, power_of_two)
    assert scale[0, 0] == 1 and not codes[:, :128].float().any()
    assert scale[0, 1] == 1 and (codes[:, 128:256].float() == 448).all()
    assert scale[0, 2] == (2 if power_of_two else pytest.approx(449 / 448))
    assert codes.float().isfinite().all() and (scale > 0).all() and scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_without_a_scale_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_blocks(torch.tensor([[1.0, bad]]))


def test_bf16_is_quantised_as_its_own_value():
    w = uneven(130, 130).bfloat16()
    for mine, other in zip(quantize_blocks(w), quantize_blocks(w.float()), strict=True):
        assert mine.view(torch.uint8).equal(other.view(torch.uint8))


def test_the_published_layout_quantises_projections_and_nothing_else():
    x = "model.layers.1."
    fp8 = [
        f"self_attn.{m}"
        for m in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b", "indexer.wk")
    ]
    fp8 += [f"mlp.{e}{m}_proj" for e in ("", "experts.3.", "shared_experts.") for m in ("gate", "up", "down")]
    plain = ["self_attn.indexer.weights_proj", "mlp.gate", "eh_proj", "embed_tokens", "shared_head.head"]
    w = uneven(8, 8).bfloat16()
    given = [(f"{x}{m}.weight", w) for m in fp8 + plain] + [("lm_head.weight", w), ("model.embed_tokens.weight", w)]
    given += [(f"{x}self_attn.indexer.k_norm.{leaf}", w[0]) for leaf in ("weight", "bias")]
    given += [
        (f"{x}mlp.gate.e_score_correction_bias", w[0].float()),
        (f"{x}self_attn.o_proj.bias", w),
        ("vector.o_proj.weight", w[0]),
    ]
    written = dict(published_fp8(given))
    assert {n for n, t in written.items() if t.dtype == torch.float8_e4m3fn} == {f"{x}{m}.weight" for m in fp8}
    assert {n for n in written if n.endswith("_scale_inv")} == {f"{x}{m}.weight_scale_inv" for m in fp8}
    assert len(written) == len(given) + len(fp8)
    assert all(
        written[n] is t for n, t in given if not written[n].dtype.is_floating_point or written[n].dtype == t.dtype
    )
    arbitrary = dict(published_fp8(given[:1], power_of_two=False))
    assert arbitrary[given[0][0] + "_scale_inv"].frexp().mantissa.ne(0.5).any()


def every_dtype():
    yield "u8", torch.arange(7, dtype=torch.uint8)
    yield "f32", torch.randn(3, 5, generator=DICE)
    yield "bf16", torch.randn(2, 3, 4, generator=DICE).bfloat16()
    yield "scalar", torch.tensor(3.5)
    yield "empty", torch.empty(0, 4)
    yield "turned", torch.arange(12.0).view(3, 4).T
    yield "fp8", torch.randn(5, 5, generator=DICE).to(torch.float8_e4m3fn)
    yield "e8m0", torch.tensor([1.0, 2.0, 0.5]).to(torch.float8_e8m0fnu)
    yield "i64", torch.arange(3)
    yield "bool", torch.tensor([True, False])
    yield "f16", torch.ones(3, dtype=torch.float16)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    )


@pytest.mark.parametrize("shards", [1, 3, lambda name: len(name) * 100])
def test_the_safetensors_library_reads_what_is_written(tmp_path, shards):
    given = dict(every_dtype())
    write_checkpoint(tmp_path, {"model_type": "x"}, given.items(), shards)
    index = read_index(tmp_path)
    assert index.problems == () and index.notes == ()
    for name, tensor in given.items():
        with safe_open(tmp_path / index.entries[name].file, "pt") as f:
            assert same(f.get_tensor(name), tensor), name
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "x"}
    assert not list(tmp_path.glob(".*"))


def test_one_shard_is_one_file_without_an_index(tmp_path):
    write_checkpoint(tmp_path, {}, every_dtype())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == dict(every_dtype()).keys()


def test_shards_follow_the_given_rule_and_the_index_names_them(tmp_path):
    tensors = [(f"{k}.{i}", torch.full((2,), float(i))) for i in range(4) for k in ("w", "s")]
    write_checkpoint(tmp_path, {}, tensors, lambda name: 7 if name.startswith("s") else 2)
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert {f for n, f in weight_map.items() if n[0] == "w"} == {"model-00001-of-00002.safetensors"}
    assert {f for n, f in weight_map.items() if n[0] == "s"} == {"model-00002-of-00002.safetensors"}
    assert len(weight_map) == 8 and read_index(tmp_path).problems == ()


def test_a_number_of_shards_balances_their_bytes(tmp_path):
    tensors = ((f"t{i:02}", torch.zeros(10 + i % 3 * 5)) for i in range(30))
    write_checkpoint(tmp_path, {}, tensors, 3)
    sizes = [f.size - f.header_bytes for f in read_index(tmp_path).files]
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= 80


def test_every_tensor_lies_on_a_multiple_of_its_element(tmp_path):
    write_checkpoint(tmp_path, {}, every_dtype())
    sizes = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}
    assert all(e.start % sizes.get(e.dtype, 1) == 0 for e in read_index(tmp_path).entries.values())


def test_an_interrupted_write_leaves_nothing_that_looks_complete(tmp_path):
    def failing():
        yield from every_dtype()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, {}, failing(), 3)
    assert list(tmp_path.iterdir()) == []


def test_index_json_is_the_last_to_appear(tmp_path, monkeypatch):
    import saccade.checkpoint.write as write

    order, replace = [], write.os.replace
    monkeypatch.setattr(write.os, "replace", lambda a, b: (order.append(b.name), replace(a, b)))
    write_checkpoint(tmp_path, {}, every_dtype(), 2)
    assert order[-1] == INDEX_FILE and len(order) == 4


def test_a_directory_that_holds_a_checkpoint_is_not_overwritten(tmp_path):
    write_checkpoint(tmp_path, {}, [("a", torch.ones(2))])
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="model.safetensors already; write to an empty directory"):
        write_checkpoint(tmp_path, {}, [("a", torch.zeros(2))])
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "given twice"),
        ([("a", torch.ones(1, dtype=torch.complex64))], "no safetensors name"),
        ([], "at least one"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=words):
        write_checkpoint(tmp_path, {}, tensors)
    assert list(tmp_path.iterdir()) == []
