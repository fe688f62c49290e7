"""Both sides of each border from 8 to 256 tokens: python -m tools.kernel_bench.batch [products] [experts] [attention]

Options: `--tokens 24,32,64,128,256` and `--context 8192`. For each number of tokens it prints what the table in
ops/gpu.py takes and what it could take instead, in us, with the rate of the bytes that must be read once, and marks the
fastest. Results are compared with the first line's. Shapes: one rank of eight of DeepSeek-V3.2. Weights and caches
rotate through more memory than L2 holds; one CUDA graph for each line. Next: kernels/types.py, which has the borders.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.kernels import PAGE, reference
from saccade.kernels.activations import prepare_activations, write_activations
from saccade.kernels.attention.sparse_decode import AttendConfig, attend_values, sparse_attention
from saccade.kernels.attention.sparse_prefill import ManyConfig, attend_in_parts, choose_splits
from saccade.kernels.indexer.logits import ScoreConfig, index_logits
from saccade.kernels.indexer.select import select, select_and_absorb
from saccade.kernels.linear.gemm import GEMM, GemmConfig, find_formats, multiply_blocks, run_gemm
from saccade.kernels.linear.head_gemm import multiply_heads
from saccade.kernels.linear.split_k import SplitKConfig, choose_split, split_k
from saccade.kernels.moe import grouped_gemm
from saccade.kernels.moe.down import run_down
from saccade.kernels.moe.few_pairs import add_few_pairs
from saccade.kernels.moe.gate_up import run_gate_up
from saccade.kernels.moe.pairs import arrange
from saccade.kernels.types import SPLIT_TOKENS, Latents, Matrix, Mlp, Rotation
from tools.kernel_bench.trials import Thunk, bf16, blocks, compile_all, route_evenly, size, time_graph

HIDDEN, LOW, HEADS, NOPE, ROPE, LORA, VALUES = 7168, 1536, 16, 128, 64, 512, 128
INDEX_HEADS, INDEX_DIM, TOPK, EXPERTS = 64, 128, 2048, 256
COLD = 200 << 20  # bytes of all sets together: L2 holds 60 MB


class Candidate(NamedTuple):
    name: str
    calls: Sequence[Thunk]  # one for each set of weights or caches


def compare(title: str, candidates: Sequence[Candidate], nbytes: float) -> None:
    """Errors against the first that runs, times, and which is the fastest."""
    compile_all([c.calls[0] for c in candidates])
    lines, best, right = [], ("", float("inf")), None
    for name, calls in candidates:
        try:
            found = calls[0]().float()
            right = found if right is None else right
            off = float((found - right).norm() / right.norm())
            us = time_graph(calls, 5)
        except Exception as error:  # one that does not compile must not end the comparison
            lines.append(f"  {name:44} {type(error).__name__}: {str(error)[:100]}")
            torch.cuda.synchronize()
            continue
        best = min(best, (name, us), key=lambda pair: pair[1])
        lines.append(f"  {name:44} {us:8.1f} us {nbytes / us / 1e6:6.2f} TB/s  {off:.0e} off")
    print(f"{title}: {nbytes / 1e6:.1f} MB, {nbytes / 4.3e6:.1f} us at 4.3 TB/s; fastest: {best[0]}", *lines, sep="\n")


def compare_products(tokens: int) -> None:
    shapes: dict[str, list[Callable[[], Matrix]]] = {
        "qkv_a, wk": [lambda: blocks(2112, HIDDEN), lambda: bf16(192, HIDDEN)],
        "q_b, wq_b": [lambda: blocks(3072, LOW), lambda: blocks(8192, LOW)],
        "o_proj": [lambda: blocks(HIDDEN, 2048)],
        "router, shared gate_up": [lambda: bf16(256, HIDDEN), lambda: blocks(512, HIDDEN)],
        "shared down": [lambda: blocks(HIDDEN, 256)],
        "dense gate_up": [lambda: blocks(4608, HIDDEN)],
        "head": [lambda: bf16(16160, HIDDEN)],
    }
    for name, makers in shapes.items():
        first = [make() for make in makers]
        count = max(2, COLD // size(first))
        sets = [first, *([make() for make in makers] for _ in range(min(count, 60) - 1))]
        x = torch.randn(tokens, first[0].data.shape[1], device="cuda")
        candidates = []
        if tokens <= SPLIT_TOKENS:
            how = choose_split(tokens, x.shape[1], [len(w.data) for w in first], size(first))
            variants = {
                "": how, " half the programs": how._replace(programs=how.programs // 2),
                " twice the programs": how._replace(programs=how.programs * 2), " 64 rows": how._replace(rows=64),
                " 64 rows, 4 warps": how._replace(rows=64, warps=4, programs=2 * how.programs),
                " 2 stages": how._replace(stages=2), " 4 stages": how._replace(stages=4),
            }  # fmt: skip
            candidates += [
                Candidate("split_k" + label, split_calls(x, sets, knobs)) for label, knobs in variants.items()
            ]
        for label, tile in {
            "": GEMM, " not split": GemmConfig(parts=1), " 32 tokens": GemmConfig(tokens=32),
            " 128 columns": GemmConfig(columns=128, stages=2),
        }.items():  # fmt: skip
            candidates.append(Candidate("gemm" + label, gemm_calls(x, sets, tile)))
        compare(f"{name}, {tokens} tokens", candidates, size(first))
        del sets
        torch.cuda.empty_cache()


def split_calls(x: Tensor, sets: Sequence[list[Matrix]], how: SplitKConfig) -> list[Thunk]:
    return [partial(split_k, x, parts, config=how) for parts in sets]


def gemm_calls(x: Tensor, sets: Sequence[list[Matrix]], tile: GemmConfig) -> list[Thunk]:
    def run(parts: list[Matrix]) -> Tensor:
        written = prepare_activations(x, *(find_formats(w) for w in parts))
        products = [
            run_gemm(written, w) if w.scale is None else multiply_blocks(written.fp16, w, tile=tile) for w in parts
        ]
        return products[0] if len(parts) == 1 else torch.cat(products, 1)

    return [partial(run, parts) for parts in sets]


def compare_experts(tokens: int) -> None:
    sets = [(blocks(EXPERTS, 512, HIDDEN), blocks(EXPERTS, HIDDEN, 256)) for _ in range(3)]
    gate_up, down = blocks(512, HIDDEN), blocks(HIDDEN, 256)
    x, h = torch.randn(tokens, HIDDEN, device="cuda"), torch.randn(tokens, HIDDEN, device="cuda")
    ids, weights = route_evenly(tokens, experts=EXPERTS)
    ids = ids.int()
    distinct = len(ids.unique())

    def pairs(up: Matrix, low: Matrix) -> Tensor:
        return run_down(x, run_gate_up(h, None, gate_up, ids, up), down, (ids, weights), low)

    def grouped(up: Matrix, low: Matrix, tiles: tuple[GemmConfig, GemmConfig]) -> Tensor:
        if tokens <= SPLIT_TOKENS:
            base = split_k(split_k(h, [gate_up]), [down], residual=x, gated=True)
            return grouped_gemm.add_experts(h, base, ids, weights, up, low, tiles)
        written = prepare_activations(h, find_formats(gate_up))
        hidden = prepare_activations(run_gemm(written, gate_up), find_formats(down), gated=True)
        return grouped_gemm.add_experts(written, run_gemm(hidden, down, residual=x), ids, weights, up, low, tiles)

    def few(up: Matrix, low: Matrix) -> Tensor:
        written, own = write_activations(h, fp16=True, permuted=True).fp16, Mlp(gate_up, down)
        return add_few_pairs(written, x, ids, weights, up, low, shared=own)

    wide, deep = GemmConfig(columns=128), GemmConfig(stages=5)
    variants = {
        "": (GEMM, GEMM), " 128 columns": (wide, wide), " 128 columns, 2 stages": (wide._replace(stages=2),) * 2,
        " 128 columns of gate": (wide, GEMM), " 128 columns of down": (GEMM, wide._replace(stages=2)),
        " 5 stages": (deep, deep), " 64 rows": (GemmConfig(rows=64),) * 2,
        " 64 rows, 128 columns": (wide._replace(rows=64),) * 2, " 8 warps": (GemmConfig(warps=8),) * 2,
    }  # fmt: skip
    candidates = [
        Candidate("grouped" + label, [partial(grouped, *s, t) for s in sets]) for label, t in variants.items()
    ]
    candidates.append(Candidate("few pairs, the shared expert among them", [partial(few, *s) for s in sets]))
    if tokens <= SPLIT_TOKENS:
        candidates.append(Candidate("pairs", [partial(pairs, *s) for s in sets]))
    nbytes = (distinct + 1) * 3 * 256 * HIDDEN
    compare(f"experts, {tokens} tokens, {distinct} distinct", candidates, nbytes)
    compare(f"arrange, {tokens} tokens", [Candidate("arrange", [lambda: arrange(ids, EXPERTS, 16).order] * 20)], 0.0)


class Requests:
    """One token each of requests of one context."""

    def __init__(self, tokens: int, context: int) -> None:
        self.device, self.tokens, self.context, pages = torch.device("cuda"), tokens, context, context // PAGE
        table = (torch.randperm(tokens * pages, device=self.device) + 1).view(tokens, pages)
        self.where = table, torch.arange(tokens, device=self.device)
        self.positions = torch.full((tokens,), context - 1, device=self.device)
        angle = self.draw(tokens, ROPE // 2)
        self.rotation = Rotation(angle.cos(), angle.sin())
        self.index_q, self.weights = self.draw(tokens, INDEX_HEADS, INDEX_DIM), self.draw(tokens, INDEX_HEADS)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def pool(self, width: int) -> Tensor:
        return self.draw((self.where[0].numel() + 1) * PAGE, width).bfloat16()

    def score(self, keys: Tensor, how: ScoreConfig) -> Tensor:
        return index_logits(
            self.index_q, self.weights, keys, *self.where, self.positions, self.rotation, scale=0.011, config=how
        )


def compare_scores(r: Requests) -> Tensor:
    options = {
        "": ScoreConfig(), " as in a prompt": ScoreConfig(64, 2048, 1, 4, 3), " chunks of 512": ScoreConfig(chunk=512),
        " chunks of 1,024": ScoreConfig(chunk=1024), " 64 keys, 4 warps": ScoreConfig(tile=64, warps=4),
        " 3 stages": ScoreConfig(stages=3),
    }  # fmt: skip
    keys = r.pool(INDEX_DIM)
    candidates = [Candidate("score" + name, [partial(r.score, keys, how)] * 2) for name, how in options.items()]
    compare(f"scores, {r.tokens} tokens of {r.context}", candidates, r.tokens * r.context * INDEX_DIM * 2)
    return r.score(keys, ScoreConfig())


def compare_selections(r: Requests, logits: Tensor) -> Tensor:
    query, w_uk = r.draw(r.tokens, HEADS, NOPE + ROPE), [(r.draw(HEADS, NOPE, LORA) / 11).bfloat16() for _ in range(2)]

    def beside(w: Tensor) -> Tensor:
        return select_and_absorb(logits, r.positions, TOPK, query, w, r.rotation)[1]

    def apart(w: Tensor) -> Tensor:
        select(logits, r.positions, TOPK)
        return multiply_heads(query, w, r.rotation)

    runs = {"select_and_absorb": beside, "select, head_gemm": apart}
    candidates = [Candidate(name, [partial(run, w) for w in w_uk]) for name, run in runs.items()]
    compare(f"selection and absorption, {r.tokens} tokens", candidates, r.tokens * r.context * 4)
    return select(logits, r.positions, TOPK)


def compare_attention(tokens: int, context: int) -> None:
    r = Requests(tokens, context)
    chosen = compare_selections(r, compare_scores(r))
    for latent in make_pools(r.pool(LORA + ROPE)):
        compare_gathered(r, chosen, latent)


def make_pools(numbers: Tensor) -> list[Latents]:
    """In BF16, and in FP8."""
    codes, rope = torch.empty(len(numbers), LORA, device="cuda").to(torch.float8_e4m3fn), numbers[:, LORA:]
    coded = Latents(codes, torch.empty_like(rope).contiguous(), torch.empty(len(numbers), device="cuda"))
    reference.write_latents(coded, torch.arange(len(numbers), device="cuda"), numbers.float())
    return [Latents(numbers), coded]


def compare_gathered(r: Requests, chosen: Tensor, latent: Latents) -> None:
    tokens, q = r.tokens, r.draw(r.tokens, HEADS, LORA + ROPE)
    w_uv = [(r.draw(HEADS, VALUES, LORA) / 22).bfloat16() for _ in range(2)]

    def many(splits: int | None, w: Tensor) -> Tensor:
        seen = attend_in_parts(q, latent, *r.where, chosen, 0.01, LORA, ManyConfig(splits))
        return multiply_heads(seen, w.transpose(1, 2)).flatten(1)

    def few(how: AttendConfig, w: Tensor) -> Tensor:
        seen = sparse_attention(q, latent, *r.where, chosen, 0.01, LORA, how)
        return multiply_heads(seen, w.transpose(1, 2)).flatten(1)

    def fused(how: AttendConfig, w: Tensor) -> Tensor:
        return attend_values(q, latent, *r.where, chosen, 0.01, w, how)

    own = choose_splits(tokens, TOPK // 64)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"sparse_prefill, head_gemm": partial(many, None)}
    for n in sorted({1, max(own - 1, 1), own + 1, 2 * own} - {own}):
        runs[f"sparse_prefill in {n}, not {own}"] = partial(many, n)
    for n in sorted({1, own, 2 * own}):
        runs[f"sparse_decode in {n}"] = partial(few, AttendConfig(splits=n, tile=64, warps=8))
    runs["sparse_decode, w_uv in its second launch"] = partial(fused, AttendConfig(splits=own, tile=64, warps=8))
    candidates = [Candidate(name, [partial(run, w) for w in w_uv]) for name, run in runs.items()]
    held = "BF16" if latent.scales is None else "FP8"
    row = sum(pool[:1].nbytes for pool in latent if pool is not None)
    compare(f"attention, {tokens} tokens, latents in {held}", candidates, tokens * TOPK * row)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Both sides of each border between 17 and 256 tokens.")
    parser.add_argument("parts", nargs="*", help="products, experts, attention; default: all")
    parser.add_argument("--tokens", default="24,32,64,128,256")
    parser.add_argument("--context", type=int, default=8192)
    asked = parser.parse_args(arguments)
    known = {"products": compare_products, "experts": compare_experts, "attention": compare_attention}
    wrong = set(asked.parts) - known.keys()
    if wrong:
        parser.error(f"expected some of {', '.join(known)}, found {', '.join(sorted(wrong))}")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    torch.manual_seed(0)
    start = time.perf_counter()
    print(torch.cuda.get_device_name())
    for tokens in map(int, asked.tokens.split(",")):
        for part in asked.parts or known:
            if part == "attention":
                compare_attention(tokens, asked.context)
            else:
                known[part](tokens)  # type: ignore[operator]
            torch.cuda.empty_cache()
            print(f"{part} of {tokens} tokens: done after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
