"""Tiny random models for tests: a config, its published tensors, the parameters made of them, and batches.

`assemble` fuses by hand, without plan/ and weights.py, so that a test of the model does not depend on them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.engine.pages import allocate_cache
from saccade.kernels import PAGE
from saccade.kernels.types import Matrix
from saccade.models.dsa.config import ModelConfig
from saccade.ops.step import Batch, Cache

Chunk = tuple[int, list[int], int]  # row of the page table, tokens, position of the first


def tiny_dict(**changes: Any) -> dict[str, Any]:
    """config.json of a model that runs in milliseconds; contexts above 16 tokens are sparse."""
    return {
        "model_type": "deepseek_v32", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
        "v_head_dim": 20, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.5, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 16,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | changes  # fmt: skip


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny_dict(**changes))


def tiny_tensors(c: ModelConfig, mtp: bool = True, copies: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """f32 numbers under their published names. Norms, biases and the router's bias are far from 1 and 0."""
    dice = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[name + ".weight"] = torch.randn(rows, columns, generator=dice) * columns**-0.5

    def vector(name: str, size: int, mean: float) -> None:
        tensors[name] = mean + 0.3 * torch.randn(size, generator=dice)

    def mlp(x: str, width: int) -> None:
        matrix(x + "gate_proj", width, c.hidden_size)
        matrix(x + "up_proj", width, c.hidden_size)
        matrix(x + "down_proj", c.hidden_size, width)

    def block(x: str, layer: int) -> None:
        a, heads, rope = x + "self_attn.", c.num_attention_heads, c.qk_rope_head_dim
        vector(x + "input_layernorm.weight", c.hidden_size, 1)
        vector(x + "post_attention_layernorm.weight", c.hidden_size, 1)
        matrix(a + "q_a_proj", c.q_lora_rank, c.hidden_size)
        vector(a + "q_a_layernorm.weight", c.q_lora_rank, 1)
        matrix(a + "q_b_proj", heads * (c.qk_nope_head_dim + rope), c.q_lora_rank)
        matrix(a + "kv_a_proj_with_mqa", c.kv_lora_rank + rope, c.hidden_size)
        vector(a + "kv_a_layernorm.weight", c.kv_lora_rank, 1)
        matrix(a + "kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        matrix(a + "o_proj", c.hidden_size, heads * c.v_head_dim)
        if c.has_indexer(layer):
            matrix(a + "indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            matrix(a + "indexer.wk", c.index_head_dim, c.hidden_size)
            matrix(a + "indexer.weights_proj", c.index_n_heads, c.hidden_size)
            vector(a + "indexer.k_norm.weight", c.index_head_dim, 1)
            vector(a + "indexer.k_norm.bias", c.index_head_dim, 0)
        if not c.is_sparse(layer):
            return mlp(x + "mlp.", c.intermediate_size)
        matrix(x + "mlp.gate", c.n_routed_experts, c.hidden_size)
        vector(x + "mlp.gate.e_score_correction_bias", c.n_routed_experts, 0)
        for e in range(c.n_routed_experts):
            mlp(f"{x}mlp.experts.{e}.", c.moe_intermediate_size)
        mlp(x + "mlp.shared_experts.", c.moe_intermediate_size * c.n_shared_experts)

    matrix("model.embed_tokens", c.vocab_size, c.hidden_size)
    for i in range(c.num_hidden_layers):
        block(f"model.layers.{i}.", i)
    vector("model.norm.weight", c.hidden_size, 1)
    matrix("lm_head", c.vocab_size, c.hidden_size)
    if mtp:
        x = f"model.layers.{c.num_hidden_layers}."
        for name in ("enorm", "hnorm", "shared_head.norm"):
            vector(f"{x}{name}.weight", c.hidden_size, 1)
        matrix(x + "eh_proj", c.hidden_size, 2 * c.hidden_size)
        block(x, c.num_hidden_layers)
        if copies:
            matrix(x + "embed_tokens", c.vocab_size, c.hidden_size)
            matrix(x + "shared_head.head", c.vocab_size, c.hidden_size)
    return tensors


class TinyWeights:
    """What the model asks of `Weights`, over a dictionary."""

    def __init__(self, held: dict[str, Tensor | Matrix]):
        self.held = dict(held)

    def has(self, name: str) -> bool:
        return name in self.held

    def take(self, name: str) -> Tensor:
        tensor = self.held.pop(name)
        assert isinstance(tensor, Tensor)
        return tensor

    def matrix(self, name: str) -> Matrix:
        held = self.held.pop(name)
        return held if isinstance(held, Matrix) else Matrix(held)


def assemble(
    c: ModelConfig, tensors: dict[str, Tensor], dtype: str = "float32", fp8: bool = False, side: int = 32
) -> TinyWeights:
    """The model's parameters: F32; or BF16 with F32 vectors; with `fp8`, linear matrices as codes with a scale for each
    block of so many rows and columns."""
    number = torch.float32 if dtype == "float32" else torch.bfloat16
    held: dict[str, Tensor | Matrix] = {}

    def get(name: str) -> Tensor:
        return tensors[name + ".weight"]

    def linear(name: str, w: Tensor) -> None:
        held[name] = encode(w, (side, side)) if fp8 else w.to(number)

    def mlp(x: str) -> None:
        linear(x + "gate_up_proj", torch.cat([get(x + "gate_proj"), get(x + "up_proj")]))
        linear(x + "down_proj", get(x + "down_proj"))

    def block(x: str) -> None:
        a = x + "self_attn."
        linear(a + "qkv_a_proj", torch.cat([get(a + "q_a_proj"), get(a + "kv_a_proj_with_mqa")]))
        linear(a + "q_b_proj", get(a + "q_b_proj"))
        kv_b = get(a + "kv_b_proj").unflatten(0, (c.num_attention_heads, -1))
        held[a + "w_uk"] = kv_b[:, : c.qk_nope_head_dim].to(number)
        held[a + "w_uv"] = kv_b[:, c.qk_nope_head_dim :].to(number)
        linear(a + "o_proj", get(a + "o_proj"))
        i = a + "indexer."
        if i + "wk.weight" in tensors:
            linear(i + "wq_b", get(i + "wq_b"))
            held[i + "wk_weights_proj"] = torch.cat([get(i + "wk"), get(i + "weights_proj")]).to(number)
        m = x + "mlp."
        if m + "gate.weight" not in tensors:
            return mlp(m)
        held[m + "gate"] = get(m + "gate").to(number)
        for part, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            stacks = [torch.cat([get(f"{m}experts.{e}.{n}") for n in names]) for e in range(c.n_routed_experts)]
            linear(f"{m}experts.{part}", torch.stack(stacks))
        mlp(m + "shared_experts.")

    for name, t in tensors.items():
        if t.ndim == 1:
            held[name] = t.clone()
    layers = c.num_hidden_layers
    extra = f"model.layers.{layers}."
    for name in ("model.embed_tokens", extra + "embed_tokens"):
        if name + ".weight" in tensors:
            held[name] = get(name).to(number)
    for name in ("lm_head", extra + "eh_proj", extra + "shared_head.head"):
        if name + ".weight" in tensors:
            linear(name, get(name))
    for i in range(layers + (extra + "eh_proj" in held)):
        block(f"model.layers.{i}.")
    return TinyWeights(held)


def encode(w: Tensor, group: tuple[int, int] = (32, 32)) -> Matrix:
    """FP8 with a scale per group, ragged at the edges. A group smaller than the published one fits tiny matrices."""
    rows, columns = -(-w.shape[-2] // group[0]), -(-w.shape[-1] // group[1])
    scale = torch.empty(*w.shape[:-2], rows, columns)
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            box = (..., slice(i * group[0], (i + 1) * group[0]), slice(j * group[1], (j + 1) * group[1]))
            scale[..., i, j] = w[box].abs().amax((-2, -1)) / 448
            codes[box] = (w[box] / scale[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return Matrix(codes, scale, group)


def page_table(lengths: Sequence[int], seed: int = 0) -> Tensor:
    """Pages for requests of these lengths, [R, P], scattered over the pools: neighbours in time are not in memory."""
    pages = [-(-n // PAGE) for n in lengths]
    free = (torch.randperm(sum(pages), generator=torch.Generator().manual_seed(seed)) + 1).split(pages)
    return torch.nn.utils.rnn.pad_sequence(list(free), batch_first=True)


def step_batch(chunks: Sequence[Chunk], table: Tensor, padding: int = 0) -> Batch:
    """One step over any chunks of any requests, with `padding` tokens behind them; logits of every row."""
    rows = [row for row, tokens, _ in chunks for _ in tokens]
    positions = [start + i for _, tokens, start in chunks for i in range(len(tokens))]
    starts = {row: start for row, _, start in chunks}
    sizes = {row: len(tokens) for row, tokens, _ in chunks}
    request, position = torch.tensor(rows), torch.tensor(positions)
    slots = table[request, position // PAGE] * PAGE + position % PAGE
    count = torch.tensor([sizes.get(r, 0) for r in range(table.shape[0])])
    zeros = torch.zeros(padding, dtype=torch.long)
    return Batch(
        tokens=torch.cat([torch.tensor([t for _, tokens, _ in chunks for t in tokens]), zeros]),
        positions=torch.cat([position, zeros]),
        slots=torch.cat([slots, zeros - 1]),
        request=torch.cat([request, zeros]),
        page_table=table,
        seq_lens=torch.tensor([starts.get(r, 0) for r in range(table.shape[0])]) + count,
        query_start=torch.cat([zeros.new_zeros(1), count.cumsum(0)]),
        logit_rows=torch.arange(len(rows) + padding),
    )


def full_batch(prompts: Sequence[Sequence[int]], padding: int = 0) -> Batch:
    """Whole prompts, one request each, in one step."""
    chunks = [(row, list(tokens), 0) for row, tokens in enumerate(prompts)]
    return step_batch(chunks, page_table([len(p) for p in prompts]), padding)


def empty_cache(c: ModelConfig, batch: Batch, dtype: str = "float32", mtp: bool = True) -> Cache:
    """Enough pages for the batch's page table."""
    return allocate_cache(c, int(batch.page_table.max()) + 1, dtype, "cpu", mtp)


def pack(w: Tensor, divides: bool = False) -> Matrix:
    """[experts, rows, columns] in NVFP4: random codes, scales for 16 columns, a global scale for each half of rows."""
    dice = torch.Generator().manual_seed(4)
    experts, rows, columns = w.shape
    codes = torch.randint(0, 256, (experts, rows, columns // 2), generator=dice, dtype=torch.uint8)
    scale = torch.randint(0x30, 0x40, (experts, rows, columns // 16), generator=dice, dtype=torch.uint8)
    second = 0.01 + 0.1 * torch.rand(experts, 2, 1, generator=dice)
    return Matrix(codes, scale.view(torch.float8_e4m3fn), (1, 16), "e2m1", 1 / second if divides else second, divides)
