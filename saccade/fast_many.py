"""A layer of many tokens on a GPU: model/decoder.py with one pass over memory where torch's operations take several.

What stands before a product, a norm or silu(gate) * up, is computed once and written in every form that the products of
this input take; what follows, a residual or a rotation, is done where the numbers are. For 8,192 tokens a layer of one
rank of eight moves 8 GB less than as operations of kernels/gpu.py. Takes the weights from the model's own objects; a
test compares the two. Few tokens: fast.py. Next: kernels/gemm.py, kernels/heads.py.
"""

from torch import Tensor

from saccade.fast_step import Step, find_routing, take_norm
from saccade.kernels import experts, gpu
from saccade.kernels.gemm import find_forms, multiply
from saccade.kernels.heads import multiply_heads
from saccade.kernels.mixture import choose
from saccade.kernels.operands import Written, join, write
from saccade.kernels.queries import prepare_queries
from saccade.kernels.reference import Selection
from saccade.kernels.select import select
from saccade.model.attention import Attention
from saccade.model.decoder import DecoderLayer
from saccade.model.layers import Mlp


def run_layer(layer: DecoderLayer, x: Tensor, step: Step, given: Selection | None) -> tuple[Tensor, Selection]:
    """x f32 [T, hidden] -> the same, and the selection it used: `given`, or its indexer's."""
    x, selected = _attend(layer, x, step, given)
    return _think(layer, x), selected


def _attend(layer: DecoderLayer, x: Tensor, step: Step, given: Selection | None) -> tuple[Tensor, Selection]:
    """x + attention(norm(x)), and the selection."""
    a, norm = layer.attention, (layer.input_norm.weight, layer.input_norm.eps)
    if given is not None:
        h = write(x, norm=norm, **find_forms(a.qkv_a_proj, precise=True)._asdict())
        low = multiply(h, a.qkv_a_proj, precise=True)
        queries = prepare_queries(low, take_norm(a.q_a_norm), find_forms(a.q_b_proj), step.entry(a))
        selected = given
    else:
        assert a.indexer is not None, "a layer that shares a selection was given none"
        both, wq_b = a.indexer.wk_weights_proj, a.indexer.wq_b
        h = write(x, norm=norm, **join(find_forms(a.qkv_a_proj, precise=True), find_forms(both))._asdict())
        low = multiply(h, a.qkv_a_proj, precise=True)
        key, weights = multiply(h, both).split([a.indexer.dim, a.indexer.heads], dim=1)
        forms = join(find_forms(a.q_b_proj), find_forms(wq_b, precise=True))
        queries = prepare_queries(low, take_norm(a.q_a_norm), forms, step.entry(a, key))
        if step.everything is not None:
            selected = step.everything
        else:
            logits = step.score(a, a.indexer, multiply(queries, wq_b, precise=True), weights)
            selected = select(logits, step.batch.positions, a.indexer.topk)
    out = _look(a, queries, selected, step)
    return multiply(write(out, **find_forms(a.o_proj)._asdict()), a.o_proj, residual=x), selected


def _look(a: Attention, queries: Written, selected: Selection, step: Step) -> Tensor:
    """f32 [T, heads * v]: what each head sees of the tokens selected."""
    q = multiply(queries, a.q_b_proj).unflatten(1, (-1, a.nope + a.rope))  # [T, heads, nope + rope]
    q = multiply_heads(q, a.w_uk, step.rotation)  # [T, heads, kv_lora + rope]
    pool, batch = step.cache.latent[a.layer], step.batch
    seen = gpu.sparse_attention(q, pool, batch.page_table, batch.request, selected, a.scale, a.kv_lora)
    return multiply_heads(seen, a.w_uv.transpose(1, 2)).flatten(1)


def _think(layer: DecoderLayer, x: Tensor) -> Tensor:
    """x + mlp(norm(x)), or the mixture of experts."""
    norm, mlp = (layer.post_attention_norm.weight, layer.post_attention_norm.eps), layer.mlp
    if isinstance(mlp, Mlp):
        h = write(x, norm=norm, **find_forms(mlp.gate_up_proj, precise=True)._asdict())
        return _run_mlp(mlp, h, x)
    shared = mlp.shared_experts
    forms = find_forms(mlp.gate), find_forms(shared.gate_up_proj, precise=True), experts.find_forms(mlp.gate_up_proj)
    h = write(x, norm=norm, **join(*forms)._asdict())
    chosen, weights = choose(multiply(h, mlp.gate), find_routing(mlp))
    x = _run_mlp(shared, h, x)
    return experts.add_experts(h, x, chosen.long(), weights, mlp.gate_up_proj, mlp.down_proj)


def _run_mlp(mlp: Mlp, h: Written, x: Tensor) -> Tensor:
    """x + mlp(h)"""
    both = multiply(h, mlp.gate_up_proj, precise=True)
    hidden = write(both, gated=True, **find_forms(mlp.down_proj, precise=True)._asdict())
    return multiply(hidden, mlp.down_proj, precise=True, residual=x)
