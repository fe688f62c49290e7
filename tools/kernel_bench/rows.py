"""Variants of the batch-1 kernels: `python -m tools.kernel_bench.rows`. Checks each against fp32 first."""

import torch

from saccade.kernels import reference
from saccade.kernels.linear.gemv import GemvConfig, run_gemv
from saccade.kernels.moe import router as mixture
from saccade.kernels.moe.down import DownConfig, run_down
from saccade.kernels.moe.gate_up import GateUpConfig, choose_config, run_gate_up
from saccade.kernels.types import Matrix, Norm, Routing
from tools.kernel_bench.timing import measure_bandwidth, time_each, try_variant

SETS = 40
HIDDEN, LOW = 7168, 1536


def make_coded(*shape: int) -> Matrix:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    codes = torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)
    *many, n, k = shape
    return Matrix(codes, torch.rand(*many, -(-n // 128), -(-k // 128), device="cuda") * 1e-3)


def make_plain(*shape: int) -> Matrix:
    return Matrix(torch.randn(shape, device="cuda").bfloat16())


def count(parts: list[Matrix]) -> int:
    return sum(t.nbytes for p in parts for t in (p.data, p.scale) if t is not None)


def compare(name: str, k: int, make: list, has_norm: bool, has_residual: bool, variants: list[GemvConfig]) -> None:
    sets = [[m() for m in make] for _ in range(SETS)]
    x = torch.randn(1, k, device="cuda")
    norm = Norm(torch.rand(k, device="cuda") + 0.5, 1e-6) if has_norm else None
    rows = sum(p.data.shape[0] for p in sets[0])
    residual = torch.randn(1, rows, device="cuda") if has_residual else None
    h = reference.rms_norm(x, norm.weight, norm.eps) if norm else x
    want = torch.cat([reference.linear(h, p) for p in sets[0]], 1)
    want = want + residual if residual is not None else want
    size = count(sets[0])
    for how in variants:

        def run(how: GemvConfig = how) -> str:
            found = run_gemv(x, sets[0], norm, residual, how)
            error = float((found - want).norm() / want.norm())
            us = time_each(lambda parts: run_gemv(x, parts, norm, residual, how), sets)
            return f"{us:7.2f} us {size / us / 1e6:5.2f} TB/s  error {error:.1e}"

        try_variant(f"{name} {size / 1e6:.1f} MB, tile {how.tile_bytes // 1024} KB, chunks {how.widest}", run)


def compare_experts(tokens: int) -> None:
    count_sets = 12
    sets = [(make_coded(256, 512, HIDDEN), make_coded(256, HIDDEN, 256)) for _ in range(count_sets)]
    shared = (make_coded(512, HIDDEN), make_coded(HIDDEN, 256))
    x = torch.randn(tokens, HIDDEN, device="cuda")
    norm = Norm(torch.rand(HIDDEN, device="cuda") + 0.5, 1e-6)
    routing = Routing(torch.randn(256, device="cuda") * 0.01, 8, 4, 8, 2.5)
    logits = [torch.randn(tokens, 256, device="cuda") for _ in sets]
    h = reference.rms_norm(x, norm.weight, norm.eps)
    scores = logits[0].sigmoid() + routing.bias
    ids, weights = mixture.choose_experts(logits[0], routing)
    hidden = run_gate_up(h, None, shared[0], ids, sets[0][0])
    worth = scores.unflatten(1, (8, -1)).topk(2, dim=2).values.sum(2)
    closed = torch.ones_like(worth, dtype=torch.bool).scatter(1, worth.topk(4, dim=1).indices, False)
    best = scores.unflatten(1, (8, -1)).masked_fill(closed[..., None], -torch.inf).flatten(1).topk(8).indices
    print("the experts that torch chooses:", bool((best == ids).all()))
    want = x + reference.expert_mlp(h, ids.long(), weights, *sets[0]) + reference.gated_mlp(h, *shared)
    found = run_down(x, hidden, shared[1], (ids, weights), sets[0][1])
    print(f"experts, {tokens} tokens: error {float((found - want).norm() / want.norm()):.1e}")
    distinct = len(ids.unique())
    up, down = (distinct * 512 + 512) * HIDDEN, (distinct + 1) * 256 * HIDDEN
    pairs = list(zip(sets, logits, strict=True))
    for how in (choose_config(tokens), GateUpConfig(8, 512, 2), GateUpConfig(8, 1024, 4, 3)):

        def run(how: GateUpConfig = how) -> str:
            us = time_each(lambda p: run_gate_up(h, None, shared[0], ids, p[0][0], how), pairs)
            return f"{us:7.2f} us {up / us / 1e6:5.2f} TB/s of {distinct} experts and the shared one"

        try_variant(f"expand {up / 1e6:.1f} MB, {how}, {tokens} tokens", run)
    try_variant("choose", lambda: f"{time_each(lambda p: mixture.choose_experts(p[1], routing), pairs):7.2f} us")
    for tile in (4096, 8192, 16384):

        def run_tile(tile: int = tile) -> str:
            config = DownConfig(tile)
            us = time_each(lambda p: run_down(x, hidden, shared[1], (ids, weights), p[0][1], config), pairs)
            return f"{us:7.2f} us {down / us / 1e6:5.2f} TB/s"

        try_variant(f"run_down {down / 1e6:.1f} MB, {tile} bytes a program, {tokens} tokens", run_tile)


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), f"plain read {measure_bandwidth():.2f} TB/s")
    tiles = [GemvConfig(14336, 1024), GemvConfig(28672, 1024), GemvConfig(57344, 1024), GemvConfig(28672, 512)]
    compare(
        "qkv_a, wk_weights",
        HIDDEN,
        [lambda: make_coded(2112, HIDDEN), lambda: make_plain(192, HIDDEN)],
        True,
        False,
        tiles,
    )
    compare("wk_weights alone", HIDDEN, [lambda: make_plain(192, HIDDEN)], True, False, tiles)
    queries = [lambda: make_coded(3072, LOW), lambda: make_coded(8192, LOW)]
    compare("q_b, wq_b", LOW, queries, True, False, [GemvConfig(n, 512) for n in (6144, 12288, 24576)])
    compare(
        "o",
        2048,
        [lambda: make_coded(HIDDEN, 2048)],
        False,
        True,
        [*(GemvConfig(n, 1024) for n in (8192, 16384, 32768)), GemvConfig(16384, 512)],
    )
    compare("gate", HIDDEN, [lambda: make_plain(256, HIDDEN)], True, False, tiles)
    compare(
        "head",
        HIDDEN,
        [lambda: make_plain(16160, HIDDEN)],
        True,
        False,
        [GemvConfig(28672, 1024), GemvConfig(57344, 1024)],
    )
    compare_experts(1)
    compare_experts(8)


if __name__ == "__main__":
    main()
