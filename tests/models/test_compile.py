"""A decoder layer is one graph: no break, no value read back, no shape that depends on data."""

from collections.abc import Iterator

import pytest
import torch
from tiny_models import TinyWeights, assemble, pack, page_table, step_batch, tiny_config, tiny_tensors
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from saccade.engine.pages import allocate_cache
from saccade.kernels import reference
from saccade.models.dsa.decoder import DecoderLayer
from saccade.models.dsa.rope import RotaryEmbedding
from saccade.ops.interface import Residual
from saccade.ops.reference import Reference
from saccade.ops.step import Batch, Cache, Step

LAYER = 1
# Requests and their tokens: prefills, decodes, decodes of several tokens, and mixtures, padded to a bucket or not.
SHAPES = [
    ([100, 90], 0), ([1, 1], 0), ([150, 1, 1], 3), ([1, 1, 1, 1, 1], 0), ([37, 64], 5), ([1, 1, 1], 0),
    ([2, 2, 2, 1], 1), ([180, 20], 0), ([1] * 8, 0), ([5, 5], 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Hyperparameters are constants: `dynamic=True` would make a symbol of each and triple the time it takes."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_int=True, specialize_float=True):
        yield
    torch._dynamo.reset()


def mark_static(held: object) -> None:
    """Tell the compiler that weights and pools have one shape; what is left to vary is the batch."""
    if isinstance(held, Tensor):
        torch._dynamo.mark_static(held)
    elif isinstance(held, tuple):
        for item in held:
            mark_static(item)
    elif type(held).__module__.startswith(("saccade.models", "saccade.ops.step")):
        mark_static(tuple(vars(held).values()))


def make_step(sizes: list[int], padding: int) -> Batch:
    """Each request's last tokens, at the end of a context of 200 to 280."""
    table = page_table([200 + 10 * r for r in range(len(sizes))])
    return step_batch([(r, list(range(n)), 200 + 10 * r - n) for r, n in enumerate(sizes)], table, padding)


def fill(cache: Cache) -> Cache:
    dice = torch.Generator().manual_seed(3)
    keys = cache.index_keys[LAYER]
    assert keys is not None
    for pool in (*cache.latent[LAYER][:2], keys.data):
        if pool is not None:
            pool.copy_(torch.randn(pool.shape, generator=dice))
    for scales in (cache.latent[LAYER].scales, keys.scales):
        if scales is not None:
            scales.copy_(2.0 ** torch.randint(-3, 3, scales.shape, generator=dice))
    return cache


# Breaks and shapes show in the first stage; the second, which does without writing in place, takes as long again. A
# graph is traced for 7 s, so `make test` traces the case that has all there is to break: projections in FP8 beside
# experts in NVFP4, over FP8 caches. Tokens that are few for the experts trace another graph.
@pytest.mark.parametrize(
    ("stored", "cached", "stages"),  # index keys and latents
    [
        ("fp8, nvfp4 experts", "fp8", "eager"),
        pytest.param("bf16", "bf16", "eager", marks=pytest.mark.soak),
        pytest.param("bf16", "fp8", "aot_eager", marks=pytest.mark.soak),
    ],
)
def test_a_layer_compiles_whole_and_few_times(
    stored: str, cached: str, stages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PREFILL_PARTS", 2)  # two parts show what eight would, in half the time
    config = tiny_config(index_n_heads=8)
    dtype = "auto"
    weights: TinyWeights = assemble(config, tiny_tensors(config), dtype, stored.startswith("fp8"))
    if "nvfp4" in stored:
        for name, w in weights.held.items():
            if ".mlp.experts." in name:
                codes = w if isinstance(w, Tensor) else w.data
                weights.held[name] = pack(codes, divides=name.endswith("down_proj"))
    layer, ops = DecoderLayer(config, weights, LAYER), Reference()
    rotary = RotaryEmbedding(config, torch.device("cpu"))
    mark_static((layer, rotary))

    def step(x: Tensor, batch: Batch, cache: Cache) -> tuple[Tensor, Tensor]:
        shared, following = Step(batch, cache, rotary(batch.positions), None), layer.input_norm
        after, selection = layer(ops, Residual(x, following), shared, None, following)
        return after.value, selection

    backend = CompileCounterWithBackend(stages)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for i, (sizes, padding) in enumerate(SHAPES):
        batch = make_step(sizes, padding)
        x = torch.randn(len(batch.tokens), config.hidden_size, generator=torch.Generator().manual_seed(i))
        caches = [fill(allocate_cache(config, 60, dtype, "cpu", False, cached, latent_cache=cached)) for _ in range(2)]
        mark_static(caches[1])
        expected, selection = step(x, batch, caches[0])
        found, same = compiled(x, batch, caches[1])
        real = len(batch.tokens) - padding
        torch.testing.assert_close(found[:real], expected[:real])
        assert same[:real].equal(selection[:real])
        every = slice(None)
        latents, same_latents = (reference.read_latents(cache.latent[LAYER], every) for cache in caches)
        assert same_latents.equal(latents)
        keys, same_keys = (cache.index_keys[LAYER] for cache in caches)
        assert keys is not None and same_keys is not None
        assert same_keys.data.float().equal(keys.data.float())
        assert (keys.scales is not None) == (cached == "fp8")
        if keys.scales is not None and same_keys.scales is not None:
            assert same_keys.scales.equal(keys.scales)
    for node in (node for module in backend.graphs for node in module.graph.nodes):
        # A value read back, or a shape that depends on data, is an unbacked symbol; fullgraph alone lets them pass.
        assert not node.meta.get("unbacked_bindings"), f"{node} depends on data"
    assert backend.frame_count <= 3, f"{backend.frame_count - 1} recompilations over {len(SHAPES)} shapes"
