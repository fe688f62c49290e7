"""Residual streams in kernels against plain torch: three blocks, from the embedding to the mean."""

import inspect
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from saccade.kernels.attention import sparse_decode
from saccade.kernels.attention.sparse_decode import AttendConfig
from saccade.kernels.moe import gate_up
from saccade.kernels.recurrent import gates
from saccade.kernels.residual import get_values
from saccade.kernels.streams import WRITE, WriteConfig, read_streams, write_streams
from saccade.kernels.types import Norm, StreamMixer
from saccade.models.glm5_next.gpu import FlashGpu
from saccade.models.glm5_next.interface import FlashOps
from saccade.models.glm5_next.operations import FlashReference
from saccade.models.parameters import Layout
from saccade.ops.gpu import Gpu, GpuQueries
from saccade.ops.interface import Residual
from saccade.parallel.ranks import ONE_RANK, OneRank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(DEVICE)


def make_mixer(streams: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> StreamMixer:
    rows, columns = 2 * streams + streams**2, streams * hidden
    fn = (draw(rows, columns, seed=seed) * columns**-0.5).to(dtype)
    return StreamMixer(fn, draw(rows, seed=seed), draw(3, seed=seed).abs() + 0.5, streams, 20, 1e-6, 1e-5)


class TwoAlike(OneRank):
    """Another rank, which has the same."""

    layout = Layout(tp=2)

    def add_up(self, part: Tensor) -> Tensor:
        return 2 * part


def pass_three_blocks(ops: FlashOps, mixers: list[StreamMixer], tokens: int, hidden: int) -> list[Tensor]:
    """What each block reads, and what is left at the end. The first finds all streams alike, the mean loses how they were
    mixed: only the third shows it."""
    norms = [Norm(draw(hidden, seed=i).abs() + 0.5, 1e-5) for i in range(4)]
    x, seen = Residual(draw(tokens, hidden), norms[0]), []
    for i, mixer in enumerate(mixers):
        x = ops.enter(x, mixer, norms[i])
        seen.append(ops.normalize(x, norms[i]))
        x = ops.add_over_ranks(x, draw(tokens, hidden, seed=7 + i), norms[i + 1])  # type: ignore[attr-defined]
    x = ops.merge(x)
    return [*seen, get_values(x.value), ops.normalize(x, norms[3])]


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17])
@pytest.mark.parametrize(("streams", "hidden", "dtype"), [(4, 200, torch.bfloat16), (2, 96, torch.float32)])
def test_blocks_read_and_write_streams_as_in_plain_torch(
    tokens: int, streams: int, hidden: int, dtype: torch.dtype
) -> None:
    mixers, ranks = [make_mixer(streams, hidden, dtype, i) for i in range(3)], TwoAlike() if tokens == 3 else ONE_RANK
    both = FlashReference(ranks), FlashGpu(ranks=ranks)
    expected, found = (pass_three_blocks(ops, mixers, tokens, hidden) for ops in both)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [gates._find_gates, gate_up._gate_up])
def test_a_kernel_of_each_block_waits_before_it_lets_the_next_one_start(kernel: Any) -> None:
    """So streams and shares of few tokens may be read before the block has ended: what wrote them has."""
    text = inspect.getsource(kernel.fn)
    assert re.findall(r"^ *(begin|wait)\(PDL\)", text, re.MULTILINE)[:2] == ["wait", "begin"]
    assert all(before == "wait" for before in re.findall(r"(\w+)\(PDL\).*\n *begin\(PDL\)", text))


def test_attention_waits_first_beside_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait before the next launch may start costs 1.9 us a layer, which DeepSeek-V3.2 need not pay."""
    text = inspect.getsource(sparse_decode._attend_rows.fn)
    assert re.search(r"if WAITS_FIRST:\s+wait\(PDL\)\s+begin\(PDL\)\s+else:\s+begin\(PDL\)\s+wait\(PDL\)", text)
    given: list[AttendConfig] = []
    monkeypatch.setattr(sparse_decode, "attend_values", lambda *args: given.append(args[-1]))
    for tokens in (1, 3):
        step: Any = SimpleNamespace(batch=SimpleNamespace(page_table=None, request=None))
        queries = GpuQueries(cast(Any, SimpleNamespace(w_uk=None)), absorbed=draw(tokens, 1))
        for ops in (Gpu(), FlashGpu()):
            ops.attend(step, queries, draw(tokens, 1).int(), cast(Any, None), draw(1, 1), 1.0)
    assert [how.waits_first for how in given] == [False, True] * 2


def test_streams_that_are_no_numbers_are_told() -> None:
    """A number above 1.8e19 has an infinite square, and one over the root of that is 0: all would be mixed alike."""
    mixer, x = make_mixer(4, 64, torch.float32), draw(3, 64)
    x[1, 5], x[2, 9] = 1e30, torch.nan
    read, mix = read_streams(*write_streams(x, mixer), mixer, Norm(torch.ones(64, device=DEVICE), 1e-5))
    assert get_values(read).isnan().all(1).tolist() == mix.isnan().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("config", [WRITE, WriteConfig(columns=32), WriteConfig(columns=16, chunk=64)])
def test_products_do_not_depend_on_how_columns_are_dealt(config: WriteConfig) -> None:
    mixer, x = make_mixer(4, 208, torch.bfloat16), draw(5, 208)
    streams, sums = write_streams(x, mixer, config)
    flat = x[:, None].expand(-1, 4, -1).flatten(1)
    assert streams.flatten(1).equal(flat)
    expected = torch.cat([flat @ mixer.fn.float().T, flat.square().sum(1, keepdim=True)], dim=1)
    torch.testing.assert_close(sums.sum(1)[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
