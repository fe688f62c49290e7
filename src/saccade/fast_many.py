"""A layer of many tokens on a GPU: model/decoder.py with one pass over memory where torch's operations take several.

What stands before a product, a norm or silu(gate) * up, is computed once and written in every form that the products of
this input take; a rotation, and behind FP8 weights a residual, are done where the numbers are. For 8,192 tokens a layer
of one rank of eight moves 8 GB less than as operations of kernels/gpu.py. Takes the weights from the model's own
objects; a test compares the two. Few tokens: fast.py. Next: kernels/gemm.py, kernels/heads.py.
"""

from torch import Tensor

from saccade.fast_step import Step, find_routing, take_norm
from saccade.kernels import experts, gpu
from saccade.kernels.linear.gemm import find_forms, multiply
from saccade.kernels.linear.head_gemm import multiply_heads
from saccade.kernels.moe.router import choose
from saccade.kernels.activations import Written, prepare
from saccade.kernels.attention.queries import prepare_queries
from saccade.kernels.reference import Selection
from saccade.kernels.indexer.select import select
from saccade.model.attention import Attention
from saccade.model.decoder import DecoderLayer
from saccade.model.layers import Mlp


def run_layer(layer: DecoderLayer, x: Tensor, step: Step, given: Selection | None) -> tuple[Tensor, Selection]:
    """x f32 [T, hidden] -> the same, and the selection it used: `given`, or its indexer's."""
    x, selected = _attend(layer, x, step, given)
    return _think(layer, x), selected


def _attend(layer: DecoderLayer, x: Tensor, step: Step, given: Selection | None) -> tuple[Tensor, Selection]:
    """x + attention(norm(x)), and the selection."""
    a = layer.attention
    queries, selected = _prepare(layer, x, step, given)
    out = _see(a, queries, selected, step)
    taken = prepare(out, find_forms(a.o_proj, precise=True))
    return multiply(taken, a.o_proj, precise=True, residual=x), selected


def _prepare(layer: DecoderLayer, x: Tensor, step: Step, given: Selection | None) -> tuple[Written, Selection]:
    """What the queries are multiplied from, and the selection; writes the tokens' rows into the cache. A function of
    its own, because the logits of 4,096 tokens over a context of 131,072 are 2 GB, and end with it."""
    a = layer.attention
    indexer = a.indexer if given is None else None
    forms, of_queries = [find_forms(a.qkv_a_proj, precise=True)], [find_forms(a.q_b_proj)]
    if indexer is not None:
        forms.append(find_forms(indexer.wk_weights_proj))
        of_queries.append(find_forms(indexer.wq_b, precise=True))
    h = prepare(x, *forms, norm=take_norm(layer.input_norm))
    low = multiply(h, a.qkv_a_proj, precise=True)
    key = weights = None
    if indexer is not None:
        key, weights = multiply(h, indexer.wk_weights_proj).split([indexer.dim, indexer.heads], dim=1)
    queries = prepare_queries(low, take_norm(a.q_a_norm), of_queries, step.entry(a, key))
    if indexer is None or weights is None:
        assert given is not None, "a layer that shares a selection was given none"
        return queries, given
    if step.everything is not None:
        return queries, step.everything
    logits = step.score(a, indexer, multiply(queries, indexer.wq_b, precise=True), weights)
    return queries, select(logits, step.batch.positions, indexer.topk)


def _see(a: Attention, queries: Written, selected: Selection, step: Step) -> Tensor:
    """f32 [T, heads * v]: what each head sees of the tokens selected."""
    q = multiply(queries, a.q_b_proj).unflatten(1, (-1, a.nope + a.rope))  # [T, heads, nope + rope]
    q = multiply_heads(q, a.w_uk, step.rotation)  # [T, heads, kv_lora + rope]
    pool, batch = step.cache.latent[a.layer], step.batch
    seen = gpu.sparse_attention(q, pool, batch.page_table, batch.request, selected, a.scale, a.kv_lora)
    return multiply_heads(seen, a.w_uv.transpose(1, 2)).flatten(1)


def _think(layer: DecoderLayer, x: Tensor) -> Tensor:
    """x + mlp(norm(x)), or the mixture of experts."""
    norm, mlp = take_norm(layer.post_attention_norm), layer.mlp
    if isinstance(mlp, Mlp):
        h = prepare(x, find_forms(mlp.gate_up_proj, precise=True), norm=norm)
        return _run_mlp(mlp, h, x)
    shared, routed = mlp.shared_experts, (mlp.gate_up_proj, mlp.down_proj)
    forms = find_forms(mlp.gate), find_forms(shared.gate_up_proj, precise=True), experts.find_forms(*routed)
    h = prepare(x, *forms, norm=norm)
    chosen, weights = choose(multiply(h, mlp.gate), find_routing(mlp))
    x = _run_mlp(shared, h, x)
    return experts.add_experts(h, x, chosen, weights, *routed)


def _run_mlp(mlp: Mlp, h: Written, x: Tensor) -> Tensor:
    """x + mlp(h)"""
    both = multiply(h, mlp.gate_up_proj, precise=True)
    hidden = prepare(both, find_forms(mlp.down_proj, precise=True), gated=True)
    return multiply(hidden, mlp.down_proj, precise=True, residual=x)
