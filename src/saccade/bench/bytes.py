"""The fewest bytes that a step must move through device memory, matrix by matrix, and the time that takes.

Counted, not measured: each weight is read once, each cache row that is looked at is read once, what is written is
written once. Activations are not counted: a step's fit in the L2 cache. What a matrix takes comes from the load plan
of a published checkpoint of the config, what a token leaves in the caches from the model family's cache rows. Next:
steps/decode.py divides the time of a step by it, plot.py draws the two beside each other.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

from saccade.bench.synthetic import plan_weights
from saccade.models.cache_rows import count_key_bytes, count_latent_bytes, count_state_bytes
from saccade.models.dsa.config import ModelConfig
from saccade.models.parameters import Layout, Param
from saccade.models.registry import find_cache_rows
from saccade.plan import Plan
from saccade.plan.active import count_active
from saccade.plan.types import DTYPE_BYTES


class Storage(NamedTuple):
    """How a step holds what can be held in several ways."""

    as_in_file: frozenset[str] = frozenset()  # last names of modules that keep the codes of the file: "wk", "kv_b_proj"
    index_cache: str = "bf16"
    latent_cache: str = "bf16"
    layout: Layout = Layout()  # which share is held


HELD = Storage()  # what the loader holds in dtype "auto"
SMALLEST = Storage(
    frozenset({"wk", "kv_b_proj"}), index_cache="fp8"
)  # everything that the checkpoint has in FP8 stays so
PACKED_FP8 = Storage(frozenset({"wk"}))
EXPERT = ".mlp.experts."  # in the name of what each token reads a few of
SCORING = "indexer.wq_b"  # only read where not every position is selected


class Size(NamedTuple):
    """Of one parameter."""

    bytes: float
    active: float  # numbers that a token of a prompt is multiplied with, see plan/active.py


def expect_experts(config: ModelConfig, batch: int) -> float:
    """How many distinct experts a layer's `batch` tokens choose, if every expert is as likely as every other."""
    n, k = config.n_routed_experts, config.num_experts_per_tok
    return n * (1 - (1 - k / n) ** batch)


@lru_cache(maxsize=8)
def measure_parameters(config: ModelConfig, storage: Storage = HELD) -> Mapping[str, Size]:
    """Every parameter of the model and its MTP layer, as the plan of a published checkpoint has it."""
    plan = plan_weights(config, mtp=True, layout=storage.layout)
    return {
        param.name: Size(count_held(plan, param, storage.as_in_file), count_active(param, config))
        for param in plan.params
    }


def count_held(plan: Plan, param: Param, as_in_file: frozenset[str]) -> float:
    """Bytes of a parameter and its scales; of parts that stay `as_in_file`, the bytes of their share of the file."""
    held = sum(plan.stored[param.name + leaf].nbytes for leaf in ("", ".scale") if param.name + leaf in plan.stored)
    entries, numbers, total = plan.index.entries, prod(param.shape), 0.0
    for part in param.parts:
        count = prod(stop - start for start, stop in part.put)
        if part.source.split(".")[-2] in as_in_file:
            files = [entries[n] for n in (part.source, part.source + "_scale_inv") if n in entries]
            total += sum(prod(e.shape) * DTYPE_BYTES[e.dtype] for e in files) * count / prod(part.shape)
        else:
            total += held * count / numbers
    return total


def name_matrix(name: str) -> str:
    """What a layer's parameter is counted as, by its name below the layer: "q_b_proj", "experts.down_proj", "norms"."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    if "norm" in module.rpartition(".")[2]:
        return "norms"
    return module.removeprefix("self_attn.").removeprefix("indexer.").removeprefix("mlp.").partition(".e_score")[0]


def count_layer(
    c: ModelConfig,
    layer: int,
    batch: int,
    context: int,
    distinct_experts: float | None = None,
    storage: Storage = HELD,
    requests: int | None = None,
) -> dict[str, float]:
    """Bytes of one layer in a decode step of `batch` tokens, each after `context` - 1 others. `distinct_experts`: of
    the layer's routed experts, how many are read; None: as many as random routing would choose. `requests`: that have
    states; None: one for each token."""
    experts = expect_experts(c, batch) if distinct_experts is None else distinct_experts
    counted: dict[str, float] = {}
    for name, size in measure_layer(c, layer, storage).items():
        if name.endswith(SCORING) and context <= c.index_topk:  # everything is selected, and nothing is scored
            continue
        matrix = name_matrix(name)
        read = experts / c.n_routed_experts if EXPERT in f".{name}" else 1.0
        counted[matrix] = counted.get(matrix, 0.0) + size.bytes * read
    kept = find_cache_rows(c, True, storage.layout)[layer]
    latent, key = (
        count_latent_bytes(kept, "auto", storage.latent_cache),
        count_key_bytes(kept, "auto", storage.index_cache),
    )
    if kept.states:
        counted["states"] = 2.0 * (requests or batch) * count_state_bytes([kept])  # read and written
    counted["latent cache"] = batch * (min(context, c.index_topk) + 1.0) * latent  # one row of them is written
    if key:
        scored = context if context > c.index_topk else 0
        counted["index keys"] = batch * (scored + 1.0) * key / kept.pool
    return counted


def measure_layer(c: ModelConfig, layer: int, storage: Storage = HELD) -> dict[str, Size]:
    """Parameters of a decoder layer by their names below it. The MTP layer's is layer `num_hidden_layers`: less its
    ends, which `count_mtp_ends` counts."""
    start = f"model.layers.{layer}."
    found = {n.removeprefix(start): s for n, s in measure_parameters(c, storage).items() if n.startswith(start)}
    decoder = ("input_layernorm.", "self_attn.", "post_attention_layernorm.", "mlp.", "hc_")
    return {name: size for name, size in found.items() if name.startswith(decoder)}


def count_mtp_ends(c: ModelConfig, storage: Storage = HELD) -> float:
    """Bytes that a pass through the MTP layer reads besides its decoder layer: eh_proj and the head."""
    held = measure_parameters(c, storage)
    return held[f"model.layers.{c.num_hidden_layers}.eh_proj"].bytes + held["lm_head"].bytes


def count_bytes(
    c: ModelConfig, batch: int, context: int, distinct_experts: float | None = None, storage: Storage = HELD,
    requests: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes of one whole decode step by matrix, all layers together, with embedding and head; their sum is the step's.
    `requests`: as `count_layer` has it.

    For DeepSeek-V3.2's rank of eight at 8,192 tokens and batch 1: 6.80 GB in `SMALLEST`, 7.04 in `HELD`.
    """
    held = measure_parameters(c, storage)
    total: dict[str, float] = {"embed_tokens": batch * held["model.embed_tokens"].bytes / c.vocab_size}
    for layer in range(c.num_hidden_layers):
        for name, amount in count_layer(c, layer, batch, context, distinct_experts, storage, requests).items():
            total[name] = total.get(name, 0.0) + amount
    total["norm"] = held["model.norm.weight"].bytes
    total["lm_head"] = held["lm_head"].bytes
    return total


def count_operations(c: ModelConfig, tokens: int, layout: Layout = Layout()) -> dict[str, float]:
    """Floating-point operations of a rank to prefill `tokens` tokens of one request, a multiplication and an addition
    counting as two; sparse attention, and only the last token's logits."""
    storage = HELD._replace(layout=layout)
    heads = c.num_attention_heads / layout.tp
    latent = 2 * c.kv_lora_rank + c.qk_rope_head_dim  # a key's numbers and a value's
    pairs = tokens * (tokens + 1) / 2  # a token and one that it can see
    k = min(tokens, c.index_topk)
    seen = k * (k + 1) / 2 + (tokens - k) * k  # a token and one that was selected
    counted = {"projections": 0.0, "MLPs": 0.0, "attention": 0.0, "index logits": 0.0}
    for layer in range(c.num_hidden_layers):
        for name, size in measure_layer(c, layer, storage).items():
            counted["MLPs" if name.startswith("mlp.") else "projections"] += 2.0 * tokens * size.active
        kept = find_cache_rows(c, False, layout)[layer]
        if c.has_indexer(layer) and tokens > c.index_topk:
            counted["index logits"] += 2 * pairs / kept.pool * c.index_n_heads * c.index_head_dim
        if kept.latent:
            counted["attention"] += 2 * seen * heads * latent
        # A head's matrix decays, answers, changes and answers again: 7 operations for each number and token.
        matrices = [prod(state.shape) for state in kept.states if len(state.shape) == 3]
        if matrices:
            counted["recurrence"] = counted.get("recurrence", 0.0) + 7.0 * tokens * sum(matrices)
    counted["logits"] = 2.0 * measure_parameters(c, storage)["lm_head"].active
    return counted
