"""THE rule table: every parameter of a DSA model, and the checkpoint tensors that it is made of.

It reads like one forward pass. It knows the config and the rank's layout, never a file: how a tensor is stored is
plan/lower.py's business, so there is no word about FP8 here. Matrices are named as in the checkpoint, less `.weight`,
but for the fused ones: qkv_a_proj, gate_up_proj, wk_weights_proj, and kv_b_proj's two halves, w_uk and w_uv.
"""

from collections.abc import Iterator

from saccade.errors import PlanError
from saccade.models.dsa.config import ModelConfig
from saccade.models.parameters import (
    Extras,
    Kind,
    Layout,
    Param,
    Part,
    columns,
    of_heads,
    rows,
    scaled,
    share,
    share_experts,
    stack,
    vector,
    whole,
)  # fmt: skip


def parameters(c: ModelConfig, at: Layout, extras: Extras = Extras()) -> Iterator[Param]:
    """Every parameter that rank `at.rank` needs, in the order in which a forward pass uses them."""
    require_layout(c, at)
    yield vocabulary("model.embed_tokens", Kind.BF16, c, at)
    for layer in range(c.num_hidden_layers):
        yield from decoder_layer(c, at, f"model.layers.{layer}.", c.is_sparse(layer), c.has_indexer(layer))
    yield vector("model.norm.weight", c.hidden_size)
    yield vocabulary("lm_head", Kind.LINEAR, c, at)
    if extras.mtp:
        yield from mtp_layer(c, at, f"model.layers.{c.num_hidden_layers}.", extras)


def find_unused(c: ModelConfig) -> dict[str, str]:
    """Prefixes of tensors that some publish and no layer reads, each with the reason."""
    reason = "the layer reuses an earlier selection (indexer_types)"
    layers = (layer for layer in range(c.num_hidden_layers) if not c.has_indexer(layer))
    return {f"model.layers.{layer}.self_attn.indexer.": reason for layer in layers}


def mtp_layer(c: ModelConfig, at: Layout, x: str, extras: Extras) -> Iterator[Param]:
    """A full decoder layer with its own indexer, between a projection of [embedding, hidden] and a head."""
    if extras.mtp_embed:
        yield vocabulary(x + "embed_tokens", Kind.BF16, c, at)
    yield vector(x + "enorm.weight", c.hidden_size)
    yield vector(x + "hnorm.weight", c.hidden_size)
    yield whole(x + "eh_proj", Kind.LINEAR, (c.hidden_size, 2 * c.hidden_size))
    yield from decoder_layer(c, at, x, c.is_sparse(c.num_hidden_layers), has_indexer=True)
    yield vector(x + "shared_head.norm.weight", c.hidden_size)
    if extras.mtp_head:
        yield vocabulary(x + "shared_head.head", Kind.LINEAR, c, at)


def decoder_layer(c: ModelConfig, at: Layout, x: str, is_sparse: bool, has_indexer: bool) -> Iterator[Param]:
    yield vector(x + "input_layernorm.weight", c.hidden_size)
    yield from attention(c, at, x + "self_attn.")
    if has_indexer:
        yield from indexer(c, x + "self_attn.indexer.")
    yield vector(x + "post_attention_layernorm.weight", c.hidden_size)
    if is_sparse:
        yield from moe(c, at, x + "mlp.")
    else:
        yield from mlp(c, at, x + "mlp.", c.intermediate_size)


def attention(c: ModelConfig, at: Layout, x: str) -> Iterator[Param]:
    """MLA. q_a and kv_a read the same input and are one matrix; kv_b is absorbed, one half into q, one into o."""
    heads = share(c.num_attention_heads, at.tp, at.rank)
    nope, rope, v, rank = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    kv_b = (c.num_attention_heads, nope + v, rank)
    yield stack(
        x + "qkv_a_proj",
        Kind.LINEAR,
        ((x + "q_a_proj", c.q_lora_rank), (x + "kv_a_proj_with_mqa", rank + rope)),
        cols=c.hidden_size,
    )
    yield vector(x + "q_a_layernorm.weight", c.q_lora_rank)
    yield vector(x + "kv_a_layernorm.weight", rank)
    yield rows(
        x + "q_b_proj", Kind.LINEAR, (c.num_attention_heads * (nope + rope), c.q_lora_rank), scaled(heads, nope + rope)
    )
    yield of_heads(x + "w_uk", x + "kv_b_proj", kv_b, heads, (0, nope))
    yield of_heads(x + "w_uv", x + "kv_b_proj", kv_b, heads, (nope, nope + v))
    yield columns(x + "o_proj", Kind.LINEAR, (c.hidden_size, c.num_attention_heads * v), scaled(heads, v))


def indexer(c: ModelConfig, x: str) -> Iterator[Param]:
    """The lightning indexer, whole on every rank. `wk` over `weights_proj` is ordinary stacking: the part that is FP8
    in the file is upcast, whatever its format, and one BF16 GEMM serves both."""
    yield whole(x + "wq_b", Kind.LINEAR, (c.index_n_heads * c.index_head_dim, c.q_lora_rank))
    yield stack(
        x + "wk_weights_proj",
        Kind.BF16,
        ((x + "wk", c.index_head_dim), (x + "weights_proj", c.index_n_heads)),
        cols=c.hidden_size,
    )
    yield vector(x + "k_norm.weight", c.index_head_dim)
    yield vector(x + "k_norm.bias", c.index_head_dim)


def mlp(c: ModelConfig, at: Layout, x: str, width: int) -> Iterator[Param]:
    mine = share(width, at.tp, at.rank)
    yield stack(
        x + "gate_up_proj",
        Kind.LINEAR,
        ((x + "gate_proj", width), (x + "up_proj", width)),
        cols=c.hidden_size,
        mine=mine,
    )
    yield columns(x + "down_proj", Kind.LINEAR, (c.hidden_size, width), mine)


def moe(c: ModelConfig, at: Layout, x: str) -> Iterator[Param]:
    """Routed experts, stacked along a leading axis: `ep` ranks divide them, tp // ep share each one's columns."""
    width, hidden = c.moe_intermediate_size, c.hidden_size
    sharers = at.tp // at.ep
    first, last = share_experts(c.n_routed_experts, at)
    lo, hi = share(width, sharers, at.rank % sharers)
    n, mine, every = last - first, hi - lo, (0, hidden)
    yield whole(x + "gate", Kind.ROUTER, (c.n_routed_experts, hidden))
    yield vector(x + "gate.e_score_correction_bias", c.n_routed_experts)
    gate_up, down = [], []
    halves = (("gate_proj", (0, mine)), ("up_proj", (mine, 2 * mine)))
    for e in range(first, last):
        here = (e - first, e - first + 1)
        for proj, put in halves:
            source = f"{x}experts.{e}.{proj}.weight"
            gate_up.append(Part(source, (width, hidden), ((lo, hi), every), (here, put, every)))
        source = f"{x}experts.{e}.down_proj.weight"
        down.append(Part(source, (hidden, width), (every, (lo, hi)), (here, every, (0, mine))))
    yield Param(x + "experts.gate_up_proj", Kind.EXPERTS, (n, 2 * mine, hidden), tuple(gate_up))
    yield Param(x + "experts.down_proj", Kind.EXPERTS, (n, hidden, mine), tuple(down))
    yield from mlp(c, at, x + "shared_experts.", width * c.n_shared_experts)


def vocabulary(name: str, kind: Kind, c: ModelConfig, at: Layout) -> Param:
    return rows(name, kind, (c.vocab_size, c.hidden_size), share(c.vocab_size, at.tp, at.rank))


def require_layout(c: ModelConfig, at: Layout) -> None:
    """Refuse a layout in which a rank would hold a fraction of a head or expert."""
    if at.tp < 1 or at.ep < 1 or not 0 <= at.rank < at.tp:
        raise PlanError(f"layout tp={at.tp} ep={at.ep} rank={at.rank}: tp and ep start at 1, rank lies below tp")
    if at.tp % at.ep:
        raise PlanError(f"ep={at.ep} does not divide tp={at.tp}: the same ranks hold experts and heads")
    if c.n_routed_experts % at.ep:
        raise PlanError(f"ep={at.ep} does not divide n_routed_experts={c.n_routed_experts}")
    sharers = at.tp // at.ep
    for key, n, by in (
        ("num_attention_heads", c.num_attention_heads, at.tp),
        ("intermediate_size", c.intermediate_size, at.tp),
        ("moe_intermediate_size * n_shared_experts", c.moe_intermediate_size * c.n_shared_experts, at.tp),
        ("moe_intermediate_size", c.moe_intermediate_size, sharers),
    ):
        if n % by:
            raise PlanError(f"tp={at.tp} ep={at.ep} cannot share {key}={n} evenly over {by} ranks; try a divisor of it")
