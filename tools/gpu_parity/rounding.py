"""Which product's rounding moves log-probabilities, on a CPU: the reference against itself with some inputs in 11 bits.

python -m tools.gpu_parity.rounding --rounded q_b,o_proj --prompts 50: both with the selections of the one that rounds
nothing. The kernels for many tokens round inputs of some products to FP16 numbers with a power of two for each row.
With those of f2aab3c (q_b, o_proj, experts) this gives 1.93e-2 for the prompts of `python -m tools.gpu_parity`, where
an H200 was 1.92e-2 off. Next: runs.py.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
from torch import Tensor

from saccade.kernels import reference
from saccade.kernels.matrix import Matrix
from saccade.llm import LLM
from saccade.model.transformer import Transformer
from tools.gpu_parity.measure import draw_prompts
from tools.gpu_parity.runs import run_both

ROUNDED = ("q_b", "experts.gate_up", "experts.down")  # what the kernels round
SHORTEST = 64  # tokens that --longest must leave
PRODUCTS = ("qkv_a", "o_proj", *ROUNDED)


def keep_11_bits(x: Tensor) -> Tensor:
    """f32, as operands.py writes the first of two FP16 numbers."""
    unit = torch.exp2(x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100).log2().floor() - 14)
    return (x / unit).half().float() * unit


def round_products(model: Transformer, rounded: Sequence[str]) -> None:
    """Let `model`, which runs on the reference's operations, round the inputs of these products."""
    spec = spec_from_file_location("rounded_reference", reference.__file__)
    assert spec is not None and spec.loader is not None
    ops = module_from_spec(spec)  # the same source, but its functions call the `linear` below
    spec.loader.exec_module(ops)
    names: dict[int, str] = {}
    hidden, linear = model.config.hidden_size, ops.linear

    def round_and_multiply(x: Tensor, w: Matrix | Tensor, *args: Any, **options: Any) -> Tensor:
        name = None
        if isinstance(w, Matrix):
            routed = "experts.gate_up" if w.data.shape[-1] == hidden else "experts.down"
            name = routed if w.data.ndim == 3 else names.get(id(w.data))
        return linear(keep_11_bits(x) if name in rounded else x, w, *args, **options)

    ops.linear = round_and_multiply  # type: ignore[attr-defined]
    for layer in model.layers:
        a = layer.attention
        names |= {id(a.qkv_a_proj.data): "qkv_a", id(a.q_b_proj.data): "q_b", id(a.o_proj.data): "o_proj"}
        for part in (a, layer.mlp):
            part.ops = ops


def measure(
    prompts: Sequence[int], longest: int, rounded: Sequence[str], index_cache: str, say: Callable[[str], None]
) -> float:
    """The largest difference of a log-probability in all of them; `say` is told each prompt's."""
    plain, other = (
        LLM(device="cpu", kernels="reference", index_cache=index_cache, cache_tokens=2 * longest) for _ in range(2)
    )
    round_products(other.model, rounded)
    drawn, most = draw_prompts(plain, 1 + max(prompts), longest), 0.0
    for i in prompts:
        both = run_both(plain, other, [drawn[i]], [len(drawn[i]) - 1])[0]
        off = (both.expected - both.imposed).abs()
        most = max(most, float(off.max()))
        where = f"prompt {i}, {len(drawn[i])} tokens"
        say(f"{where}: largest {off.max():.2e} at {int(off.argmax())}, mean {off.mean():.1e}")
    return most


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What rounding the inputs of products changes, on a CPU.")
    parser.add_argument("--rounded", default=",".join(ROUNDED), help=f"of {', '.join(PRODUCTS)}; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--longest", type=int, default=4030, help="tokens of a prompt")
    parser.add_argument("--index-cache", choices=("bf16", "fp8"), default="bf16")
    asked = parser.parse_args(arguments)
    rounded = [name for name in asked.rounded.split(",") if name]
    if unknown := set(rounded) - set(PRODUCTS):
        parser.error(f"--rounded: expected some of {', '.join(PRODUCTS)}, found {', '.join(sorted(unknown))}")
    if asked.prompts < 1 or asked.longest < SHORTEST:
        parser.error(f"expected 1 prompt or more, and --longest of {SHORTEST} at least: a word problem's tokens")
    most = measure(range(asked.prompts), asked.longest, rounded, asked.index_cache, lambda t: print(t, file=sys.stderr))
    print(f"index cache {asked.index_cache}, {asked.prompts} prompts, rounded {', '.join(rounded)}: largest {most:.2e}")


if __name__ == "__main__":
    main()
