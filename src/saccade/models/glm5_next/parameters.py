"""Every parameter of GLM-5.3-Flash, and the checkpoint tensors that it is made of. It reads like a forward pass.

Tensors are named as in dsa/parameters.py; in most files they lie below `model.language_model.` (ROOTS). Fused, whatever
the file's format, are the three projections that an indexer makes of one input (`wk_gate_weights_proj`, always BF16)
and the six of a recurrent layer (`in_proj`). Knows no file. Next: transformer.py.
"""

from collections.abc import Iterable, Iterator

from saccade.errors import PlanError
from saccade.models.dsa.parameters import attention, mlp, moe, require_layout, vocabulary
from saccade.models.glm5_next.config import FlashConfig
from saccade.models.parameters import (
    Extras,
    Kind,
    Layout,
    Param,
    Part,
    Shape,
    Span,
    columns,
    rows,
    scaled,
    share,
    vector,
    whole,
)

ROOTS = ("model.language_model.", "model.")  # published; a text model that was saved alone
VISION = "the vision tower: prompts with images are not supported"
OTHER_MODELS = {"model.visual.": VISION, "visual.": VISION}


def parameters(c: FlashConfig, at: Layout, extras: Extras = Extras()) -> Iterator[Param]:
    """Every parameter that rank `at.rank` needs, in the order in which a forward pass uses them."""
    require_layout(c, at)
    if c.linear_num_heads % at.tp:
        raise PlanError(f"tp={at.tp} cannot share linear_num_heads={c.linear_num_heads} evenly; try a divisor of it")
    yield vocabulary("model.embed_tokens", Kind.BF16, c, at)
    for layer in range(c.num_hidden_layers):
        x = f"model.layers.{layer}."
        yield from streams(c, x + "hc_attn_")
        yield from block(c, at, x, layer)
        yield from streams(c, x + "hc_ffn_")
        yield from feed_forward(c, at, x, layer)
    yield vector("model.norm.weight", c.hidden_size)
    yield vocabulary("lm_head", Kind.LINEAR, c, at)
    if extras.mtp:
        yield from mtp_layer(c, at, f"model.layers.{c.num_hidden_layers}.", extras)


def stays_plain(c: FlashConfig, module: str) -> bool:
    """Whether the published FP8 layout leaves a matrix in BF16: recurrent layers, indexers, kv_b_proj, all of the
    vision tower."""
    if not module.startswith("model.layers."):
        return True
    layer, _, name = module.removeprefix("model.layers.").partition(".")
    if ".indexer." in name or name.endswith(".kv_b_proj"):
        return True
    return name.startswith("self_attn.") and layer.isdecimal() and c.is_recurrent(int(layer))


def find_unused(c: FlashConfig) -> dict[str, str]:
    """Prefixes of tensors that some publish and no layer reads, each with the reason."""
    x = "model.layers."
    shared = "the layer reuses an earlier selection (indexer_types)"
    recurrent = "the layer is recurrent: it selects nothing (layer_types)"
    unused = {}
    for layer in range(c.num_hidden_layers):
        if not c.has_indexer(layer):
            unused[f"{x}{layer}.self_attn.indexer."] = recurrent if c.is_recurrent(layer) else shared
    return unused


def mtp_layer(c: FlashConfig, at: Layout, x: str, extras: Extras) -> Iterator[Param]:
    """An attention layer with experts and one residual stream, between a projection of [embedding, hidden] and a
    head."""
    if extras.mtp_embed:
        yield vocabulary(x + "embed_tokens", Kind.BF16, c, at)
    yield vector(x + "enorm.weight", c.hidden_size)
    yield vector(x + "hnorm.weight", c.hidden_size)
    yield whole(x + "eh_proj", Kind.LINEAR, (c.hidden_size, 2 * c.hidden_size))
    yield from block(c, at, x, c.num_hidden_layers)
    yield from feed_forward(c, at, x, c.num_hidden_layers)
    yield vector(x + "shared_head.norm.weight", c.hidden_size)
    if extras.mtp_head:
        yield vocabulary(x + "shared_head.head", Kind.LINEAR, c, at)


def streams(c: FlashConfig, x: str) -> Iterator[Param]:
    """What mixes the residual streams in front of a block and behind it, for every rank: [pre, post, comb]."""
    outputs = (2 + c.hc_mult) * c.hc_mult
    yield tensor(x + "fn", Kind.ROUTER, (outputs, c.hc_mult * c.hidden_size))
    yield vector(x + "base", outputs, Kind.F32_ONLY)
    yield vector(x + "scale", 3, Kind.F32_ONLY)


def block(c: FlashConfig, at: Layout, x: str, layer: int) -> Iterator[Param]:
    yield vector(x + "input_layernorm.weight", c.hidden_size)
    if c.is_recurrent(layer):
        yield from recurrence(c, at, x + "self_attn.")
        return
    yield from attention(c, at, x + "self_attn.")
    if c.has_indexer(layer):
        yield from indexer(c, x + "self_attn.indexer.")


def feed_forward(c: FlashConfig, at: Layout, x: str, layer: int) -> Iterator[Param]:
    yield vector(x + "post_attention_layernorm.weight", c.hidden_size)
    if c.is_sparse(layer):
        yield from moe(c, at, x + "mlp.")
    else:
        yield from mlp(c, at, x + "mlp.", c.intermediate_size)


def indexer(c: FlashConfig, x: str) -> Iterator[Param]:
    """The lightning indexer, whole on every rank. `wk`, the pooling gate and `weights_proj` read the same input: one
    BF16 parameter and one product, whatever the file stores them in."""
    yield whole(x + "wq_b", Kind.LINEAR, (c.index_n_heads * c.index_head_dim, c.q_lora_rank))
    pieces = (
        (x + "wk.weight", c.index_head_dim, (0, c.index_head_dim)),
        (x + "index_kpool_compress_gate", c.index_head_dim, (0, c.index_head_dim)),
        (x + "weights_proj.weight", c.index_n_heads, (0, c.index_n_heads)),
    )
    yield stack_spans(x + "wk_gate_weights_proj", Kind.BF16, pieces, c.hidden_size)
    yield vector(x + "k_norm.weight", c.index_head_dim)
    yield vector(x + "k_norm.bias", c.index_head_dim)
    yield tensor(x + "index_kpool_compress_ape", Kind.F32, (c.index_kpool, c.index_head_dim))


def recurrence(c: FlashConfig, at: Layout, x: str) -> Iterator[Param]:
    """KDA: ranks share heads. Queries, keys, values, beta and the low ranks of both gates read one input."""
    count, dim = c.linear_num_heads, c.linear_head_dim
    heads = share(count, at.tp, at.rank)
    mine, every = scaled(heads, dim), (0, dim)
    pieces = (
        *((f"{x}{name}_proj.weight", count * dim, mine) for name in "qkv"),
        (x + "b_proj.weight", count, heads),
        (x + "f_a_proj.weight", dim, every),
        (x + "g_a_proj.weight", dim, every),
    )
    yield stack_spans(x + "in_proj", Kind.LINEAR, pieces, c.hidden_size)
    yield convolution(x, count * dim, mine, c.linear_conv_kernel_dim)
    yield rows(x + "f_b_proj", Kind.LINEAR, (count * dim, dim), mine)
    yield slice_of(x + "dt_bias", count * dim, mine)
    yield slice_of(x + "A_log", count, heads)
    yield rows(x + "g_b_proj", Kind.LINEAR, (count * dim, dim), mine)
    yield vector(x + "o_norm.weight", dim)
    yield columns(x + "o_proj", Kind.LINEAR, (c.hidden_size, count * dim), mine)


def convolution(x: str, channels: int, mine: Span, width: int) -> Param:
    """One filter a channel, of queries over keys over values: [3 * channels of this rank, width]."""
    count, every, parts = mine[1] - mine[0], (0, width), []
    for i, name in enumerate("qkv"):
        put = (i * count, (i + 1) * count), every
        parts.append(Part(f"{x}{name}_conv1d.weight", (channels, 1, width), (mine, every), put, (channels, width)))
    return Param(x + "conv1d.weight", Kind.F32, (3 * count, width), tuple(parts))


def stack_spans(name: str, kind: Kind, pieces: Iterable[tuple[str, int, Span]], cols: int) -> Param:
    """Matrices of `cols` columns over one another: of each (tensor, its rows) those of a span."""
    parts, top, every = [], 0, (0, cols)
    for source, height, (lo, hi) in pieces:
        parts.append(Part(source, (height, cols), ((lo, hi), every), ((top, top + hi - lo), every)))
        top += hi - lo
    return Param(name, kind, (top, cols), tuple(parts))


def tensor(name: str, kind: Kind, shape: Shape) -> Param:
    """A tensor whose name has no `.weight`, whole on every rank."""
    every = tuple((0, n) for n in shape)
    return Param(name, kind, shape, (Part(name, shape, every, every),))


def slice_of(name: str, length: int, mine: Span) -> Param:
    """This rank's numbers of a vector."""
    return Param(
        name, Kind.F32_ONLY, (mine[1] - mine[0],), (Part(name, (length,), (mine,), ((0, mine[1] - mine[0]),)),)
    )
