"""What GLM-5.3-Flash adds to a layer, alone: `python -m tools.kernel_bench.flash [streams] [pools]`.

Option: `--tokens 1,2,8,64,2048,8192`. Half a layer of residual streams, and scores with selection over pools of four
tokens, each as it is and with what it could be instead, in us, with the rate of the bytes that must move. Shapes: one
rank of eight. Weights rotate through more memory than L2 holds. Next: kernels/streams.py.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels.indexer.logits import index_logits
from saccade.kernels.indexer.select import select_and_absorb
from saccade.kernels.streams import Unwritten, WriteConfig, merge_streams, read_streams, write_streams
from saccade.kernels.types import Norm, Rotation, StreamMixer
from tools.kernel_bench.timing import measure_bandwidth, time_each, try_variant

HIDDEN, STREAMS, COLD = 4096, 4, 160  # sets of 0.79 MB: L2 holds 60 MB
INDEX_HEADS, DIM, TOPK, POOL, HEADS, NOPE, LORA = 32, 128, 2048, 4, 8, 256, 512
VARIANTS = {
    "": WriteConfig(), ", 32 columns": WriteConfig(columns=32), ", 128 columns": WriteConfig(columns=128),
    ", 8 warps": WriteConfig(warps=8), ", 528 programs": WriteConfig(programs=528),
    ", sixteen tokens together": WriteConfig(tokens=16),
}  # fmt: skip


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def report(nbytes: float, us: float) -> str:
    return f"{us:8.2f} us {nbytes / us / 1e6:5.2f} TB/s"


def make_mixer() -> StreamMixer:
    fn = (draw(STREAMS * (2 + STREAMS), STREAMS * HIDDEN) / 128).bfloat16()
    return StreamMixer(fn, draw(len(fn)), draw(3).abs(), STREAMS, 20, 1e-6, 1e-5)


def compare_streams(tokens: int) -> None:
    mixers, norm = [make_mixer() for _ in range(COLD)], Norm(draw(HIDDEN).abs(), 1e-5)
    _, mix = read_streams(*write_streams(draw(tokens, HIDDEN), mixers[0]), mixers[0], norm)
    given = Unwritten(draw(tokens, STREAMS, HIDDEN), draw(tokens, HIDDEN), mix, mixers[0])
    row, fn = tokens * HIDDEN * 4, mixers[0].fn.nbytes
    written, taken = fn + (2 * STREAMS + 1) * row, (STREAMS + 1) * row
    streams, sums = write_streams(given, mixers[0])
    flat = streams.flatten(1).double() @ mixers[0].fn.double().T
    for name, how in VARIANTS.items():

        def write(how: WriteConfig = how) -> str:
            found = write_streams(given, mixers[0], how)[1].sum(1)[:, : flat.shape[1]]
            us = time_each(lambda mixer: write_streams(given, mixer, how), mixers)
            return f"{report(written, us)}  error {(found - flat).abs().max() / flat.abs().max():.1e}"

        try_variant(f"write streams, {tokens} tokens{name}", write)

    def read() -> str:
        return report(taken, time_each(lambda mixer: read_streams(streams, sums, mixer, norm), mixers))

    def half(mixer: StreamMixer) -> object:
        return read_streams(*write_streams(given, mixer), mixer, norm)

    try_variant(f"read streams, {tokens} tokens", read)
    try_variant(f"both, {tokens} tokens", lambda: report(written + taken, time_each(half, mixers)))
    merge = partial(merge_streams, given)
    try_variant(f"mean, {tokens} tokens", lambda: report(taken + row, time_each(merge, [norm] * 20)))


def compare_pools(tokens: int, context: int = 8192) -> None:
    """One token each of so many requests."""
    pages, page = context // PAGE, PAGE // POOL
    table = (torch.randperm(tokens * pages, device="cuda") + 1).view(tokens, pages)
    request, positions = torch.arange(tokens, device="cuda"), torch.full((tokens,), context - 1, device="cuda")
    q, weights = draw(tokens, INDEX_HEADS, DIM), draw(tokens, INDEX_HEADS)
    keys = [draw((tokens * pages + 1) * page, DIM).bfloat16() for _ in range(2)]
    query, w_uk = draw(tokens, HEADS, NOPE), (draw(HEADS, NOPE, LORA) / 16).bfloat16()
    rotation = Rotation(*torch.empty(2, tokens, 0, device="cuda"))

    def score(pool: Tensor) -> Tensor:
        return index_logits(q, weights, pool, table, request, positions, scale=0.01, fills=False, pool=POOL)

    logits, pairs = score(keys[0]), context // POOL

    def choose(_: Tensor) -> object:
        return select_and_absorb(logits, positions, TOPK // POOL, query, w_uk, rotation, pool=POOL)

    nbytes = tokens * pairs * DIM * 2
    try_variant(f"scores of {pairs} pools, {tokens} tokens", lambda: report(nbytes, time_each(score, keys)))
    moved = tokens * (pairs + TOPK) * 4 + w_uk.nbytes
    try_variant(f"their selection, {tokens} tokens", lambda: report(moved, time_each(choose, keys)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Residual streams and pooled keys of GLM-5.3-Flash.")
    parser.add_argument("parts", nargs="*", help="streams, pools; default: both")
    parser.add_argument("--tokens", default="1,2,8,64,2048,8192")
    asked = parser.parse_args(arguments)
    wrong = set(asked.parts) - {"streams", "pools"}
    if wrong:
        parser.error(f"expected streams or pools, found {', '.join(sorted(wrong))}")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), f"plain read {measure_bandwidth():.2f} TB/s")
    for tokens in map(int, asked.tokens.split(",")):
        if "pools" not in asked.parts or len(asked.parts) > 1:
            compare_streams(tokens)
        if tokens <= 256 and asked.parts != ["streams"]:
            compare_pools(tokens)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
