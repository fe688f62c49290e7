"""The fewest bytes that a step must move through device memory, matrix by matrix, and the time that takes.

Counted, not measured: each weight read once, each cache row that is looked at read once, what is written written once.
Activations are not counted: a step's fit in the L2 cache. Pure arithmetic on a config. Next: steps/decode.py divides
the time of a step by it, plot.py draws the two beside each other.
"""

from typing import NamedTuple

from saccade.models.dsa.config import ModelConfig

BLOCK = 128


class Storage(NamedTuple):
    """Bytes of what may be stored in several ways."""

    wk: float = 2.0  # a weight of the indexer's key projection: BF16, or 1: FP8
    kv_b: float = 2.0  # of w_uk and w_uv: BF16, or 1: FP8
    latent: float = 2.0  # a number in the latent cache
    key: float = 2.0  # a number in the index-key cache; FP8 with one F32 scale a row is 1 + 4 / 128
    linear: float = 1.0  # of projections and experts: FP8 (with scales), or BF16, F32
    plain: float = 2.0  # of embedding, head, router and weights_proj


HELD = Storage()  # what the loader holds in dtype "auto"
LEAST = Storage(wk=1.0, kv_b=1.0, key=1.0 + 4 / 128)  # everything that the checkpoint has in FP8 left so
PACKED_FP8 = Storage(wk=1.0)


def expect_experts(config: ModelConfig, batch: int) -> float:
    """How many distinct experts a layer's `batch` tokens choose, if every expert is as likely as every other."""
    n, k = config.n_routed_experts, config.num_experts_per_tok
    return n * (1 - (1 - k / n) ** batch)


def count_layer(
    c: ModelConfig,
    layer: int,
    batch: int,
    context: int,
    distinct_experts: float | None = None,
    storage: Storage = HELD,
) -> dict[str, float]:
    """Bytes of one layer in a decode step of `batch` tokens, each after `context` - 1 others. `distinct_experts`: of
    the layer's routed experts, how many are read; None: as many as random routing would choose."""
    hidden, heads, q_lora, rank = c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank
    nope, rope, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim

    def linear(rows: int, columns: int, width: float = storage.linear) -> float:
        scales = 4 * -(-rows // BLOCK) * -(-columns // BLOCK) if width == 1 else 0
        return rows * columns * width + scales

    looked_at = min(context, c.index_topk)
    counted = {
        "norms": 4.0 * (2 * hidden + q_lora + rank),
        "qkv_a_proj": linear(q_lora, hidden) + linear(rank + rope, hidden),
        "q_b_proj": linear(heads * (nope + rope), q_lora),
        "w_uk": linear(heads * nope, rank, storage.kv_b),
        "w_uv": linear(heads * v, rank, storage.kv_b),
        "o_proj": linear(hidden, heads * v),
        "latent cache": batch * (looked_at + 1) * (rank + rope) * storage.latent,
    }
    if c.has_indexer(layer):
        dim = c.index_head_dim
        counted["norms"] += 4.0 * 2 * dim
        counted["wk"] = linear(dim, hidden, storage.wk)
        counted["weights_proj"] = c.index_n_heads * hidden * storage.plain
        counted["index keys"] = batch * dim * storage.key  # the new ones, written
        if context > c.index_topk:  # else everything is selected, and nothing is scored
            counted["wq_b"] = linear(c.index_n_heads * dim, q_lora)
            counted["index keys"] += batch * context * dim * storage.key
    if not c.is_sparse(layer):
        counted["gate_up_proj"] = linear(2 * c.intermediate_size, hidden)
        counted["down_proj"] = linear(hidden, c.intermediate_size)
        return counted
    width, shared = c.moe_intermediate_size, c.moe_intermediate_size * c.n_shared_experts
    experts = expect_experts(c, batch) if distinct_experts is None else distinct_experts
    counted["gate"] = c.n_routed_experts * (hidden * storage.plain + 4)
    counted["experts.gate_up_proj"] = experts * linear(2 * width, hidden)
    counted["experts.down_proj"] = experts * linear(hidden, width)
    counted["shared_experts.gate_up_proj"] = linear(2 * shared, hidden)
    counted["shared_experts.down_proj"] = linear(hidden, shared)
    return counted


def count_bytes(
    c: ModelConfig, batch: int, context: int, distinct_experts: float | None = None, storage: Storage = HELD
) -> dict[str, float]:
    """Bytes of one whole decode step by matrix, all layers together, with embedding and head; their sum is the step's.

    For DeepSeek-V3.2's rank of eight at 8,192 tokens and batch 1: 6.80 GB in `LEAST`, 7.04 in `HELD`.
    """
    total: dict[str, float] = {"embed_tokens": batch * c.hidden_size * storage.plain}
    for layer in range(c.num_hidden_layers):
        for name, amount in count_layer(c, layer, batch, context, distinct_experts, storage).items():
            total[name] = total.get(name, 0.0) + amount
    total["norm"] = 4.0 * c.hidden_size
    total["lm_head"] = c.vocab_size * c.hidden_size * storage.plain
    return total


def count_operations(c: ModelConfig, tokens: int) -> dict[str, float]:
    """Floating-point operations to prefill `tokens` tokens of one request, a multiplication and an addition counting
    as two; sparse attention, and only the last token's logits."""
    hidden, heads, q_lora, rank = c.hidden_size, c.num_attention_heads, c.q_lora_rank, c.kv_lora_rank
    nope, rope, v, dim = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.index_head_dim
    pairs = tokens * (tokens + 1) / 2  # a token and one that it can see
    k = min(tokens, c.index_topk)
    seen = k * (k + 1) / 2 + (tokens - k) * k  # a token and one that was selected
    counted = {"projections": 0.0, "MLPs": 0.0, "attention": 0.0, "index logits": 0.0}
    for layer in range(c.num_hidden_layers):
        weights = hidden * (q_lora + rank + rope) + q_lora * heads * (nope + rope)
        weights += heads * rank * (nope + v) + hidden * heads * v
        if c.has_indexer(layer):
            weights += hidden * (dim + c.index_n_heads) + q_lora * c.index_n_heads * dim
            if tokens > c.index_topk:
                counted["index logits"] += 2 * pairs * c.index_n_heads * dim
        counted["projections"] += 2.0 * tokens * weights
        width = c.intermediate_size
        if c.is_sparse(layer):
            width = c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
            counted["MLPs"] += 2.0 * tokens * hidden * c.n_routed_experts
        counted["MLPs"] += 2.0 * tokens * 3 * hidden * width
        counted["attention"] += 2 * seen * heads * (2 * rank + rope)
    counted["logits"] = 2.0 * c.vocab_size * hidden
    return counted
