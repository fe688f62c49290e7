"""GLM-5.3-Flash in kernels on a CUDA device, at the sizes of one rank of eight: against plain torch, and in graphs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saccade.bench.rig import BENCH_ARRANGEMENTS, REFERENCE_ARRANGEMENT, Rig, build_rig
from saccade.bench.steps.eager import EagerSteps, one_request, random_tokens, shuffle_pages
from saccade.engine.pages import allocate_cache
from saccade.kernels import PAGE
from saccade.kernels.streams import Unwritten, merge_streams, read_streams, write_streams
from saccade.kernels.types import Norm, StreamMixer
from saccade.models.glm5_next.operations import FlashReference
from saccade.ops.interface import Residual
from saccade.ops.step import Cache

SHAPE, LAYERS, CONTEXT = "glm5-next-rank-of-8", 4, 2500  # three recurrent layers and one that attends; sparse
CHUNKS = (2100, 1, 1, 2, 3, 16, 17, 64, 65, 231)  # tokens of a step


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    yield build_rig(SHAPE, LAYERS, torch.device("cuda"), with_flash=True)
    torch.cuda.empty_cache()


def make_cache(rig: Rig, requests: int, pages: int, index_cache: str = "bf16", latent_cache: str = "bf16") -> Cache:
    options = {"mtp": False, "index_cache": index_cache, "requests": requests, "latent_cache": latent_cache}
    return allocate_cache(rig.shape.config, requests * pages + 1, rig.plan.dtype, rig.device, **options)


def run_prompt(rig: Rig, arrangement: str, tokens: Tensor, *caches: str) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens, and the selections of the last layer."""
    pages = -(-CONTEXT // PAGE)
    cache, table = make_cache(rig, 1, pages, *caches), shuffle_pages(1, pages, rig.device)
    model, hidden, selections, start = rig.make_model(arrangement), [], [], 0
    for size in CHUNKS:
        seen: list[Tensor] = []
        batch = one_request(tokens[start : start + size], start, table)
        hidden.append(model.forward(batch, cache, seen))
        row = torch.full((size, 2051), -1, dtype=torch.int32, device=rig.device)
        width = min(seen[-1].shape[1], 2051)
        row[:, :width] = seen[-1][:, :width]
        selections.append(row)
        start += size
    return torch.cat(hidden), torch.cat(selections)


@pytest.mark.gpu
@pytest.mark.parametrize("caches", [("bf16", "bf16"), ("fp8", "bf16"), ("bf16", "fp8")])  # index keys, latents
@torch.inference_mode()
def test_steps_of_any_size_are_the_model_s(rig: Rig, caches: tuple[str, str]) -> None:
    """Near ties of scores and of experts may fall to the other side, and change what comes behind them."""
    tokens = random_tokens(rig.shape.config.vocab_size, CONTEXT, rig.device)
    expected, chosen = run_prompt(rig, REFERENCE_ARRANGEMENT, tokens, *caches)
    found, selected = run_prompt(rig, BENCH_ARRANGEMENTS[0], tokens, *caches)
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    same = (selected == chosen).float().mean()
    print(f"{caches}: off {off.median():.1e}, 9 of 10 {off.quantile(0.9):.1e}, largest {off.max():.1e}; {same:.2%}")
    assert off.median() < 1e-3 and off.quantile(0.9) < 5e-2 and same > 0.98


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 8])
@torch.inference_mode()
def test_a_graph_gives_the_tokens_of_its_launches(rig: Rig, batch: int) -> None:
    """And the same again from the same states."""
    pages, start = 40, 100
    cache, table = make_cache(rig, batch, pages), shuffle_pages(batch, pages, rig.device)
    tokens = random_tokens(rig.shape.config.vocab_size, batch, rig.device)
    first = torch.full((batch,), start, device=rig.device)
    eager = EagerSteps(rig.make_model(BENCH_ARRANGEMENTS[0]), cache, batch)  # keeps the states before a step's
    graph = rig.make_steps(BENCH_ARRANGEMENTS[0], cache, batch, pages)
    texts = []
    for steps in (eager, graph, graph):
        steps.load(tokens, first, table)
        seen = []
        for _ in range(12):  # across the ends of three pools
            steps.run()
            seen.append(steps.tokens.tolist())
        texts.append(seen)
    print(f"{graph.kernels} launches a step of {LAYERS} layers")
    assert texts[1] == texts[2]
    assert texts[0] == texts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 256, 2048])
@torch.inference_mode()
def test_streams_of_real_size(tokens: int) -> None:
    dice, hidden = torch.Generator("cuda").manual_seed(tokens), 4096

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=dice, device="cuda")

    mixer = StreamMixer((draw(24, 4 * hidden) / 128).bfloat16(), draw(24), draw(3).abs() + 0.5, 4, 20, 1e-6, 1e-5)
    norm, x, part, plain = Norm(draw(hidden).abs(), 1e-5), draw(tokens, hidden), draw(tokens, hidden), FlashReference()
    before = plain.enter(Residual(x, norm), mixer, norm)
    after = plain.enter(plain.add_over_ranks(before, part, norm), mixer, norm)
    streams, sums = write_streams(x, mixer)
    _, mix = read_streams(streams, sums, mixer, norm)
    unwritten = Unwritten(streams, part, mix, mixer)
    torch.cuda.synchronize()  # a block would have waited: streams and shares are read early
    streams, sums = write_streams(unwritten, mixer)
    read, _ = read_streams(streams, sums, mixer, norm)
    found = read if isinstance(read, Tensor) else read.x
    for a, b in ((streams, after.value.values), (found, after.value.read)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    merged = merge_streams(unwritten, norm)
    merged = merged if isinstance(merged, Tensor) else merged.x
    torch.testing.assert_close(merged, after.value.values.mean(1), rtol=1e-4, atol=1e-4)
