"""What prompts have two kernels for: python -m tools.kernel_bench.prompt [PARTS]

Parts: attention, scores, selection, products, experts; all by default. Attention gathers rows, or passes by all
positions with a mask, in one BF16 number or two. Scores come from queries in two BF16 numbers, in one, or in FP8.
Products see 22 bits, BF16 or FP8, by torch where it has them.

`--context 1024,8192,32768`: of a prompt; its last 4,096 tokens are timed, which is the dearest chunk. Errors are
against the first line. Shapes: one rank of eight of DeepSeek-V3.2. Next: kernels/types.py, which has the borders.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from saccade.bench.options import parse_counts
from saccade.kernels import ACTIVATION_NAMES, PAGE, reference
from saccade.kernels.activations import prepare_activations
from saccade.kernels.attention.dense import dense_attention
from saccade.kernels.attention.expand import expand_latents
from saccade.kernels.attention.mask import write_mask
from saccade.kernels.attention.masked import ONE_PART, TWO_PARTS, MaskedConfig, masked_attention
from saccade.kernels.attention.sparse_prefill import sparse_attention_of_many
from saccade.kernels.indexer.logits import index_logits
from saccade.kernels.indexer.prompt_logits import BF16_SCORES, FP8_SCORES, PromptScoreConfig, score_prompt
from saccade.kernels.indexer.queries import write_index_queries
from saccade.kernels.indexer.select import SELECT_SEVERAL, select
from saccade.kernels.indexer.select_hopper import RowConfig, select_by_hand
from saccade.kernels.linear.fp8_gemm import CODES, CodesConfig, multiply_codes
from saccade.kernels.linear.gemm import find_formats, run_gemm
from saccade.kernels.linear.head_gemm import multiply_heads
from saccade.kernels.moe.fp8_experts import DOWN, GATE_UP, Fp8Config, add_fp8_experts
from saccade.kernels.moe.grouped_gemm import add_experts, find_expert_formats
from saccade.kernels.types import IndexKeys, Latents, Matrix, Rotation
from tools.kernel_bench.batch import (
    EXPERTS,
    HEADS,
    HIDDEN,
    INDEX_DIM,
    INDEX_HEADS,
    LORA,
    LOW,
    NOPE,
    ROPE,
    TOPK,
    VALUES,
    Candidate,
    compare,
)
from tools.kernel_bench.trials import blocks, route_evenly

CHUNK = 4096  # tokens of a step


class LastChunk:
    """The last tokens of a prompt of `context`, in shuffled pages, each of which selects TOPK positions by chance."""

    def __init__(self, context: int) -> None:
        self.context, self.tokens = context, min(CHUNK, context)
        pages, device = context // PAGE, "cuda"
        self.table = (torch.randperm(pages, device=device) + 1)[None]
        self.rows = (pages + 1) * PAGE
        self.lengths = torch.full((1,), context, device=device)
        self.request = torch.zeros(self.tokens, dtype=torch.int64, device=device)
        self.positions = torch.arange(context - self.tokens, context, device=device)
        angle = torch.randn(self.tokens, ROPE // 2, device=device)
        self.rotation = Rotation(angle.cos(), angle.sin())

    def select(self) -> Tensor:
        found = []
        for some in self.positions.split(512):
            logits = torch.rand(len(some), self.context, device="cuda")
            hidden = torch.arange(self.context, device="cuda") > some[:, None]
            found.append(reference.select(logits.masked_fill(hidden, -torch.inf), some, TOPK))
        return torch.cat(found)


def compare_attention(context: int) -> None:
    it, scale = LastChunk(context), 0.07
    q = torch.randn(it.tokens, HEADS, NOPE + ROPE, device="cuda")
    latent = Latents(torch.randn(it.rows, LORA + ROPE, device="cuda").bfloat16())
    w_uk, w_uv = (torch.randn(HEADS, n, LORA, device="cuda").bfloat16() / 22 for n in (NOPE, VALUES))
    selection = it.select()

    def gather(activations: str) -> Tensor:
        absorbed = multiply_heads(q, w_uk, it.rotation, activations)
        seen = sparse_attention_of_many(absorbed, latent, it.table, it.request, selection, scale, LORA)
        return multiply_heads(seen, w_uv.transpose(1, 2), activations=activations)

    def mask(activations: str, config: MaskedConfig | None = None) -> Tensor:
        return masked_attention(
            q, latent, it.table, it.lengths, it.request, it.positions, selection, w_uk, w_uv, it.rotation, scale,
            activations, config,
        )  # fmt: skip

    def pass_by_latents() -> Tensor:
        absorbed = multiply_heads(q, w_uk, it.rotation)
        seen = dense_attention(absorbed, latent, it.table, it.request, it.positions, scale, LORA)
        return multiply_heads(seen, w_uv.transpose(1, 2))

    candidates = {
        **({"all positions, absorbed (dense.py)": pass_by_latents} if context <= TOPK else {}),
        "gathered, with w_uk and w_uv, exact": partial(gather, "exact"),
        "gathered, bf16": partial(gather, "bf16"),
        "masked, exact": partial(mask, "exact"),
        "masked, exact, in Triton": partial(mask, "exact", TWO_PARTS._replace(by_hand=False)),
        "masked, bf16": partial(mask, "bf16"),
        "masked, bf16, in Triton": partial(mask, "bf16", ONE_PART._replace(by_hand=False)),
    }
    moved = 2 * latent.data.nbytes + q.nbytes
    compare(f"attention of {it.tokens} tokens at {context}", as_candidates(candidates), moved)
    parts: dict[str, Callable[[], Tensor]] = {
        "  of it: the mask": lambda: (
            write_mask(selection, it.request, it.positions, context // PAGE, 1, ONE_PART.rows).words
        ),
        "  of it: keys and values, bf16": lambda: expand_latents(latent, it.table, it.lengths, w_uk, w_uv, 1).keys,
        "  of it: keys and values, exact": lambda: expand_latents(latent, it.table, it.lengths, w_uk, w_uv, 2).keys,
    }
    for name, part in parts.items():
        compare(name, [Candidate(name, [part])], latent.data.nbytes)


def compare_scores(context: int) -> None:
    it, scale = LastChunk(context), 0.011
    q = torch.randn(it.tokens, INDEX_HEADS, INDEX_DIM, device="cuda")
    weights = torch.randn(it.tokens, INDEX_HEADS, device="cuda")
    numbers = torch.randn(it.rows, INDEX_DIM, device="cuda")
    plain, coded = IndexKeys(numbers.bfloat16()), IndexKeys(*reference.quantize_rows(numbers))
    where = it.table, it.request, it.positions
    seen = torch.arange(context, device="cuda") <= it.positions[:, None]

    def old() -> Tensor:
        return index_logits(q, weights, plain.data, *where, rotation=it.rotation, scale=scale, fills=False)

    def old_fp8() -> Tensor:
        written = write_index_queries(q, weights, it.rotation, False, scale, coded.data.dtype)
        return index_logits(*written, coded.data, *where, key_scales=coded.scales, fills=False)

    def new(keys: IndexKeys, config: PromptScoreConfig | None = None) -> Tensor:
        return score_prompt(
            write_index_queries(q, weights, it.rotation, False, scale, keys.data.dtype), keys, *where, config
        )

    def hide(run: Callable[[], Tensor]) -> Tensor:
        return run().masked_fill_(~seen, 0.0)

    candidates = {
        "two products in BF16 (exact)": old,
        "FP8 keys, one product in BF16 (exact)": old_fp8,
        "one product in BF16": partial(new, plain),
        "one product in FP8": partial(new, coded),
        "BF16, in Triton": partial(new, plain, BF16_SCORES),
        "BF16, in Triton, 256 columns": partial(new, plain, BF16_SCORES._replace(columns=256)),
        "FP8, in Triton": partial(new, coded, FP8_SCORES),
        "FP8, in Triton, 128 columns": partial(new, coded, FP8_SCORES._replace(columns=128)),
    }
    for name, run in candidates.items():
        off = float((hide(run) - hide(old)).norm() / hide(old).norm())
        print(f"  {name:44} {off:.1e} off the first")
    # Every token sees the first position: what is not written must not be compared.
    firsts = {name: partial(take_first, run) for name, run in candidates.items()}
    compare(f"scores of {it.tokens} tokens at {context}", as_candidates(firsts), numbers.nbytes + q.nbytes)


def compare_selections(context: int) -> None:
    it = LastChunk(context)
    logits = torch.randn(it.tokens, context, device="cuda")
    candidates: dict[str, Callable[[], Tensor]] = {
        "by hand": partial(select, logits, it.positions, TOPK),
        "in Triton": partial(select, logits, it.positions, TOPK, SELECT_SEVERAL),
    }
    for spans, warps in ((4, 16), (4, 8), (2, 8), (1, 8)):
        how = RowConfig(spans, warps)
        candidates[f"by hand, {tuple(how)}"] = partial(select_by_hand, logits, it.positions, TOPK, how)
    compare(f"selection of {it.tokens} tokens at {context}", as_candidates(candidates), logits.nbytes)


def take_first(run: Callable[[], Tensor]) -> Tensor:
    return run()[:, :1]


def compare_prompt_products(tokens: int) -> None:
    shapes = {"qkv_a": (2112, HIDDEN), "q_b and wq_b": (11264, LOW), "o_proj": (HIDDEN, 2048), "shared": (512, HIDDEN)}
    for name, (n, k) in shapes.items():
        w, x = blocks(n, k), torch.randn(tokens, k, device="cuda")
        written = prepare_activations(x, *(find_formats(w, how) for how in ACTIVATION_NAMES))
        candidates: dict[str, Callable[[], Tensor]] = {
            how: partial(run_gemm, written, w, how) for how in ACTIVATION_NAMES
        }
        for tile in (CODES, CodesConfig(stages=3), CodesConfig(tokens=64, warps=4), CodesConfig(tokens=256)):
            candidates[f"fp8 {tuple(tile)}"] = partial(multiply_codes, written.fp8, w, config=tile)
        compare(f"{name}, {tokens} tokens", as_candidates(candidates), x.nbytes + w.data.nbytes)
        inputs = {how: partial(write_input, x, w, how) for how in ACTIVATION_NAMES}
        compare("  of it: its input, written", as_candidates(inputs), x.nbytes)


def compare_prompt_experts(tokens: int) -> None:
    x, up, down = torch.randn(tokens, HIDDEN, device="cuda"), blocks(EXPERTS, 512, HIDDEN), blocks(EXPERTS, HIDDEN, 256)
    (ids, weights), base = route_evenly(tokens, experts=EXPERTS), torch.zeros(tokens, HIDDEN, device="cuda")
    written = prepare_activations(x, *(find_expert_formats(up, down, how) for how in ACTIVATION_NAMES))

    def run(how: str) -> Tensor:
        return add_experts(written, base, ids.int(), weights, up, down, activations=how)

    candidates: dict[str, Callable[[], Tensor]] = {how: partial(run, how) for how in ACTIVATION_NAMES}
    for each in (1, 2, 8):
        tiles = GATE_UP, DOWN._replace(each=each)
        name = f"fp8, {each} tiles of rows a program of down"
        candidates[name] = partial(add_fp8_experts, written.fp8, base, ids.int(), weights, up, down, how=tiles)
    wide = Fp8Config(pairs=128, warps=8), DOWN._replace(warps=8)
    candidates["fp8, 128 pairs"] = partial(add_fp8_experts, written.fp8, base, ids.int(), weights, up, down, how=wide)
    compare(f"experts, {tokens} tokens", as_candidates(candidates), x.nbytes + up.data.nbytes + down.data.nbytes)


def write_input(x: Tensor, w: Matrix, activations: str) -> Tensor:
    """Nothing to compare: the product's input, written."""
    prepare_activations(x, find_formats(w, activations))
    return x[:0]


def as_candidates(runs: dict[str, Callable[[], Tensor]]) -> Sequence[Candidate]:
    return [Candidate(name, [run] * 2) for name, run in runs.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the kernels of prompts, old against new, on a GPU.")
    parser.add_argument("parts", nargs="*", help="attention, scores, selection, products, experts; default: all")
    parser.add_argument("--context", default="1024,8192,32768")
    asked = parser.parse_args()
    runs = {
        "attention": compare_attention, "scores": compare_scores, "selection": compare_selections,
        "products": compare_prompt_products, "experts": compare_prompt_experts,
    }  # fmt: skip
    if not set(asked.parts) <= set(runs):
        parser.error(f"expected some of {', '.join(runs)}, found {', '.join(asked.parts)}")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    start = time.perf_counter()
    for part in asked.parts or runs:
        for context in parse_counts("context", asked.context):
            runs[part](min(context, CHUNK) if part in ("products", "experts") else context)
            torch.cuda.empty_cache()
            print(f"{part} at {context} done after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
