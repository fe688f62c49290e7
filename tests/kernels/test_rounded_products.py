"""Products whose inputs are rounded to BF16 or FP8: the kernels see what `round_inputs` says, bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from coded_matrices import RULES, encoded
from noted_selections import Given, Noting
from products import blocks, draw, draw_choice, error, exact, widen
from tiny_models import assemble, empty_cache, full_batch, tiny_config, tiny_tensors
from torch import Tensor

from saccade.kernels import ACTIVATION_NAMES, reference, types
from saccade.kernels.activations import prepare_activations, write_activations
from saccade.kernels.attention.masked import masked_attention
from saccade.kernels.linear.fp8_gemm import CodesConfig, multiply_codes
from saccade.kernels.linear.head_gemm import multiply_heads
from saccade.kernels.moe.fp8_experts import Fp8Config, add_fp8_experts
from saccade.kernels.moe.grouped_gemm import add_experts, expert_mlp, find_expert_formats
from saccade.kernels.types import Matrix
from saccade.models.dsa.transformer import Transformer
from saccade.ops import gpu
from saccade.ops.gpu import Gpu, multiply_any
from saccade.ops.reference import Reference

ROUNDING = ACTIVATION_NAMES[1:]
FORMS = ["blocks", next(form for form in sorted(RULES) if form.startswith("e2m1"))]


def stack_blocks(count: int, rows: int, columns: int) -> Matrix:
    parts = [blocks(rows, columns, seed=seed) for seed in range(count)]
    scales = [part.scale for part in parts if part.scale is not None]
    return Matrix(torch.stack([part.data for part in parts]), torch.stack(scales))


def test_what_products_see_is_what_the_reference_rounds_to() -> None:
    """Rows of any size; the last group of columns is short, and one row is zeros."""
    x = draw(6, 272) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1e6, 0.0])[:, None]
    found = write_activations(x, fp16=True, rounded=True, fp8=True)
    rounded = found.rounded.high.double() * found.rounded.unit[:, None].double()
    assert rounded.equal(reference.round_inputs(x, blocks(128, 272), "bf16").double())
    numbers = found.fp8.numbers.float() * found.fp8.scales.repeat_interleave(128, 1)[:, :272]
    assert numbers.equal(reference.round_inputs(x, blocks(128, 272), "fp8"))
    assert 1e-3 < error(rounded, x.double()) < 2**-8 and 1e-2 < error(numbers, x.double()) < 2**-4
    assert error((found.fp16.high.double() + found.fp16.low) * found.fp16.unit[:, None], x.double()) < 2**-22


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_so_in_fp8(value: float) -> None:
    x = draw(2, 256)
    x[1, 200] = value
    y = multiply_any(x.repeat(40, 1), blocks(128, 256), activations="fp8")
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("activations", ROUNDING)
@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_products_of_rounded_inputs(form: str, activations: str) -> None:
    x, w, rest = draw(100, 272), blocks(200, 272), draw(100, 200, seed=5)
    if form == "bf16":
        w = Matrix(reference.decode(w).bfloat16())
    seen = reference.round_inputs(x, w, activations)
    assert not seen.equal(x) and (form == "fp8" or seen.equal(x.bfloat16().float()))
    assert error(multiply_any(x, w, rest, activations) - rest, exact(seen, w)) < 1e-6
    for few in (1, 2, 20):
        assert error(multiply_any(x[:few], w, activations=activations), exact(seen[:few], w)) < 1e-6


def test_codes_in_other_tiles() -> None:
    x, w = write_activations(draw(70, 384), fp8=True).fp8, blocks(300, 384)
    wanted = multiply_codes(x, w)
    assert error(multiply_codes(x, w, config=CodesConfig(rows=64, tokens=32)), wanted.double()) < 1e-6


def test_heads_times_rounded_inputs() -> None:
    x, w = draw(70, 3, 72), draw(3, 72, 140, seed=2).bfloat16()
    wanted = torch.bmm(x.bfloat16().transpose(0, 1).double(), w.double()).transpose(0, 1)
    assert error(multiply_heads(x, w, activations="fp8"), wanted) < 1e-6


@pytest.mark.parametrize("activations", ROUNDING)
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_rounded_inputs(form: str, activations: str) -> None:
    """What is between two roundings of gate times up may fall to the other side: a few numbers of a thousand."""
    if form == "blocks":
        gate_up, down = stack_blocks(3, 256, 256), stack_blocks(3, 256, 128)
    else:
        gate_up, down = encoded(form, 64, 256, 2), encoded(form, 256, 64, 1)
    x, (experts, weights) = draw(20, 256, spread=0.1), draw_choice(20, 3, 2)
    wanted = reference.expert_mlp(x, experts, weights, gate_up, down, activations=activations).double()
    unrounded = reference.expert_mlp(x, experts, weights, gate_up, down).double()
    found = error(expert_mlp(x, experts, weights, gate_up, down, activations=activations), wanted)
    assert found < 0.1 * error(unrounded, wanted), found


@pytest.mark.parametrize(("hidden", "inner"), [(208, 64), (256, 192), (384, 40)])
@pytest.mark.parametrize("topk", [1, 3])
def test_experts_in_fp8_of_any_width(hidden: int, inner: int, topk: int) -> None:
    """Steps and tiles of rows that overhang, a width that no kernel takes (40), and pairs of other ranks' experts, whose
    memory nobody writes: new memory holds NaN here."""
    gate_up, down = stack_blocks(3, 2 * inner, hidden), stack_blocks(3, hidden, inner)
    x, (experts, weights) = draw(30, hidden, spread=0.1), draw_choice(30, 3, topk)
    experts[::4, 0] = -1
    base = draw(30, hidden, seed=9)
    wanted = base.double() + reference.expert_mlp(x, experts, weights, gate_up, down, activations="fp8").double()
    unrounded = base + reference.expert_mlp(x, experts, weights, gate_up, down)
    written = prepare_activations(x, find_expert_formats(gate_up, down, "fp8"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = add_experts(written, base, experts.int(), weights, gate_up, down, activations="fp8")
    finally:
        torch.use_deterministic_algorithms(False)
    assert error(found - base, wanted - base) < 0.1 * error(unrounded.double() - base, wanted - base)


def test_experts_in_fp8_in_other_tiles() -> None:
    """The same numbers, whatever the tiles: only whole sums of 128 columns are rounded."""
    gate_up, down = stack_blocks(3, 256, 256), stack_blocks(3, 384, 128)
    x, (experts, weights) = write_activations(draw(40, 256), fp8=True).fp8, draw_choice(40, 3, 2)
    wanted = add_fp8_experts(x, None, experts, weights, gate_up, down)
    for gate, last in ((Fp8Config(16, 32, 2), Fp8Config(16, 64, 1)), (Fp8Config(32, 128), Fp8Config(32, 128, 2))):
        assert torch.equal(add_fp8_experts(x, None, experts, weights, gate_up, down, how=(gate, last)), wanted)


@pytest.mark.parametrize(("activations", "is_masked"), [("exact", True), ("bf16", False), ("fp8", True)])
def test_a_model_of_many_tokens_equals_the_reference(
    activations: str, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 tokens, more than SPLIT_TOKENS here, whose attention is masked. Both round the same inputs of products, but for those
    between two roundings; keys, values and probabilities are rounded to BF16 beyond "exact", and no later than that."""
    config = tiny_config(
        hidden_size=128, q_lora_rank=64, moe_intermediate_size=64, intermediate_size=128, v_head_dim=32,
        qk_nope_head_dim=32, num_hidden_layers=1, first_k_dense_replace=0,
    )  # fmt: skip
    batch = replace(full_batch([list(range(1, 22)), list(range(40, 43))]), rounds=True)
    weights, masks = widen(assemble(config, tiny_tensors(config), "auto", True)), list[str]()
    monkeypatch.setattr(gpu, "CAPTURED_TOKENS", 16 if is_masked else 64)
    monkeypatch.setattr(gpu, "has_room", lambda *_: is_masked)
    monkeypatch.setattr(types, "SPLIT_TOKENS", 16)
    monkeypatch.setitem(types.GATHERED_POSITIONS, "exact", 8000)

    def note(*args: Any) -> Tensor:
        masks.append(args[-1])
        return masked_attention(*args)

    monkeypatch.setattr(gpu, "masked_attention", note)
    noting = Noting(activations)
    model, hidden = Transformer(config, weights, noting), []
    for ops in (noting, Given(noting.seen, activations), Reference()):
        hidden.append(model.with_ops(ops).forward(batch, empty_cache(config, batch, "auto")))
    assert masks == [activations] * is_masked
    found, moved = (error(other, hidden[0].double()) for other in hidden[1:])
    if activations == "exact":
        assert found < 1e-4 and moved == 0
    else:
        assert found < moved * 0.5


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("activations", ROUNDING)
def test_few_tokens_of_a_step_that_rounds(activations: str, dense: int) -> None:
    """What they get is what they get among many; without rounding it is exact, whatever is asked for."""
    config = tiny_config(
        hidden_size=128, q_lora_rank=64, moe_intermediate_size=64, intermediate_size=128, v_head_dim=32,
        qk_nope_head_dim=32, num_hidden_layers=1, first_k_dense_replace=dense,
    )  # fmt: skip
    model = Transformer(
        config, widen(assemble(config, tiny_tensors(config), "auto", True)), Gpu(activations=activations)
    )

    def run(tokens: int, rounds: bool) -> Tensor:
        batch = replace(full_batch([list(range(1, 1 + tokens))]), rounds=rounds)
        return model.forward(batch, empty_cache(config, batch, "auto")).double()

    many = run(70, True)
    for tokens in (1, 2, 3, 20):
        found, whole = run(tokens, True), run(tokens, False)
        assert error(found, many[:tokens]) < 1e-5 and error(found, whole) > 1e-3
        batch = full_batch([list(range(1, 1 + tokens))])
        exact_one = model.with_ops(Reference()).forward(batch, empty_cache(config, batch, "auto"))
        assert error(whole, exact_one.double()) < 1e-3
