"""The toy's parameters, and what its layers keep."""

from collections.abc import Iterator

from saccade.errors import PlanError
from saccade.models.cache_rows import LayerCache, State
from saccade.models.parameters import Extras, Kind, Layout, Param, of_heads, stack, vector, whole
from toy_family.config import ToyConfig


def parameters(c: ToyConfig, at: Layout, extras: Extras) -> Iterator[Param]:
    if at.tp > 1:
        raise PlanError(f"tp={at.tp}: the toy runs on one rank")
    yield whole("embed", Kind.BF16, (c.vocab_size, c.hidden_size))
    for i, kind in enumerate(c.layer_types):
        x = f"layers.{i}."
        yield from streams(x + "mixer.")
        yield vector(x + "norm.weight", c.hidden_size)
        yield from attention(c, x) if kind == "attention" else running_sum(c, x)
        yield from streams(x + "mlp_mixer.")
        yield vector(x + "mlp_norm.weight", c.hidden_size)
        halves = (x + "mlp.gate_proj", c.intermediate_size), (x + "mlp.up_proj", c.intermediate_size)
        yield stack(x + "mlp.gate_up_proj", Kind.LINEAR, halves, cols=c.hidden_size)
        yield whole(x + "mlp.down_proj", Kind.LINEAR, (c.hidden_size, c.intermediate_size))
    yield vector("last_mixer.read", 2)
    yield vector("norm.weight", c.hidden_size)
    yield whole("lm_head", Kind.LINEAR, (c.vocab_size, c.hidden_size))


def streams(x: str) -> Iterator[Param]:
    yield vector(x + "read", 2)
    yield vector(x + "write", 2)


def attention(c: ToyConfig, x: str) -> Iterator[Param]:
    heads, rank, nope, rope = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim
    a, every = x + "attention.", (0, c.num_attention_heads)
    yield stack(a + "qkv_a", Kind.LINEAR, ((a + "q_a", c.q_lora_rank), (a + "kv_a", rank + rope)), cols=c.hidden_size)
    yield vector(a + "q_norm.weight", c.q_lora_rank)
    yield vector(a + "kv_norm.weight", rank)
    yield whole(a + "q_b", Kind.LINEAR, (heads * (nope + rope), c.q_lora_rank))
    yield of_heads(a + "w_uk", a + "k_b", (heads, nope, rank), every, (0, nope))
    yield of_heads(a + "w_uv", a + "v_b", (heads, c.v_head_dim, rank), every, (0, c.v_head_dim))
    yield whole(a + "o", Kind.LINEAR, (c.hidden_size, heads * c.v_head_dim))
    i = x + "indexer."
    yield whole(i + "wq_b", Kind.LINEAR, (c.index_n_heads * c.index_head_dim, c.q_lora_rank))
    rows = (i + "wk", c.index_head_dim), (i + "weights", c.index_n_heads), (i + "gate", c.index_n_heads)
    yield stack(i + "wk_weights_gate", Kind.BF16, rows, cols=c.hidden_size)
    yield vector(i + "k_norm.weight", c.index_head_dim)


def running_sum(c: ToyConfig, x: str) -> Iterator[Param]:
    yield whole(x + "sum.in_proj", Kind.LINEAR, (c.sum_dim, c.hidden_size))
    yield vector(x + "sum.decay", c.sum_dim)
    yield whole(x + "sum.out_proj", Kind.LINEAR, (c.hidden_size, c.sum_dim))


def cache_rows(c: ToyConfig, mtp: bool, at: Layout) -> list[LayerCache]:
    rope = c.qk_rope_head_dim
    attending = LayerCache(latent=c.kv_lora_rank + rope, index_key=c.index_head_dim, rope=rope)
    summing = LayerCache(states=(State("sum", (c.sum_dim,)),))
    return [attending if kind == "attention" else summing for kind in c.layer_types]
