"""The toy's forward pass."""

from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.kernels.types import CacheRows, KeyNorm, Mlp, Norm, Rotation, Selection
from saccade.ops.interface import Embedding, Fused, Head, IndexerShape, QueryWeights, Residual
from saccade.ops.step import Batch, Cache, Step
from toy_family.config import ToyConfig
from toy_family.operations import Mixer, ToyReference

if TYPE_CHECKING:
    from saccade.weights.weights import Weights


class Rotary:
    def __init__(self, c: ToyConfig, device: torch.device):
        self.frequencies = 1000.0 ** -(torch.arange(0, c.qk_rope_head_dim, 2, device=device) / c.qk_rope_head_dim)
        self._positions = c.max_position_embeddings

    def __call__(self, positions: Tensor) -> Rotation:
        angles = positions[:, None] * self.frequencies
        return Rotation(angles.cos(), angles.sin())

    @cached_property
    def table(self) -> Tensor:
        return torch.stack(self(torch.arange(self._positions, device=self.frequencies.device)), 1)


class Attention:
    def __init__(self, c: ToyConfig, weights: "Weights", layer: int):
        a, i = f"layers.{layer}.attention.", f"layers.{layer}.indexer."
        self.layer = layer
        low = weights.matrix(a + "qkv_a")
        self.low = Fused(low, (low.data.shape[0],))
        self.kv_norm = Norm(weights.take(a + "kv_norm.weight"), c.eps)
        q_norm = Norm(weights.take(a + "q_norm.weight"), c.eps)
        self.queries = QueryWeights(
            q_norm, weights.matrix(a + "q_b"), weights.take(a + "w_uk"), weights.matrix(i + "wq_b")
        )
        self.w_uv, self.o = weights.take(a + "w_uv"), weights.matrix(a + "o")
        rows = (c.index_head_dim, c.index_n_heads, c.index_n_heads)
        self.key_weights_gate = Fused(weights.matrix(i + "wk_weights_gate"), rows)
        weight = weights.take(i + "k_norm.weight")
        self.key_norm = KeyNorm(weight, torch.zeros_like(weight), c.eps, False)
        self.index = IndexerShape(c.index_n_heads, c.index_head_dim, c.index_topk, c.qk_rope_head_dim, False, 1.0)
        self.scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5

    def __call__(
        self, ops: ToyReference, x: Residual, norm: Norm, step: Step, following: Norm
    ) -> tuple[Residual, Selection]:
        low, key, weights, gate = ops.project(x, norm, [self.low, self.key_weights_gate])
        cache = step.cache
        rows = CacheRows(self.kv_norm, cache.latent[self.layer], key, self.key_norm, cache.index_keys[self.layer])
        queries = ops.make_queries(step, low, self.queries, rows)
        logits = ops.score(step, queries, weights * gate.sigmoid(), rows, self.index)
        selection, queries = ops.select(step, logits, queries, self.index)
        seen = ops.attend(step, queries, selection, rows.latent, self.w_uv, self.scale)
        return ops.add_projection(x, seen, self.o, following), selection


class RunningSum:
    def __init__(self, weights: "Weights", layer: int):
        x = f"layers.{layer}.sum."
        self.layer = layer
        matrix = weights.matrix(x + "in_proj")
        self.in_proj, self.decay = Fused(matrix, (matrix.data.shape[0],)), weights.take(x + "decay")
        self.out_proj = weights.matrix(x + "out_proj")

    def __call__(
        self, ops: ToyReference, x: Residual, norm: Norm, step: Step, following: Norm
    ) -> tuple[Residual, None]:
        (moved,) = ops.project(x, norm, [self.in_proj])
        summed = ops.scan(step.batch, moved, self.decay, step.cache.states[self.layer]["sum"])
        return ops.add_projection(x, summed, self.out_proj, following), None


class Layer:
    def __init__(self, c: ToyConfig, weights: "Weights", i: int):
        x = f"layers.{i}."
        self.mixer = Mixer(weights.take(x + "mixer.read"), weights.take(x + "mixer.write"))
        self.norm = Norm(weights.take(x + "norm.weight"), c.eps)
        is_attending = c.layer_types[i] == "attention"
        self.block = Attention(c, weights, i) if is_attending else RunningSum(weights, i)
        self.mlp_mixer = Mixer(weights.take(x + "mlp_mixer.read"), weights.take(x + "mlp_mixer.write"))
        self.mlp_norm = Norm(weights.take(x + "mlp_norm.weight"), c.eps)
        self.mlp = Mlp(weights.matrix(x + "mlp.gate_up_proj"), weights.matrix(x + "mlp.down_proj"))

    def __call__(self, ops: ToyReference, streams: Tensor, step: Step) -> tuple[Tensor, Selection | None]:
        before = ops.mix(streams, self.mixer.read, self.norm)
        after, selection = self.block(ops, before, self.norm, step, self.norm)
        streams = ops.spread(streams, before, after, self.mixer.write)
        before = ops.mix(streams, self.mlp_mixer.read, self.mlp_norm)
        after = ops.add_mlp(before, self.mlp_norm, self.mlp, self.mlp_norm)
        return ops.spread(streams, before, after, self.mlp_mixer.write), selection


class ToyModel:
    mtp = None

    def __init__(self, config: ToyConfig, weights: "Weights", ops: ToyReference):
        self.config, self.ops = config, ops
        self.embed = Embedding(weights.take("embed"), config.vocab_size)
        self.rotary = Rotary(config, self.embed.rows.device)
        self.layers = [Layer(config, weights, i) for i in range(config.num_hidden_layers)]
        self.read, self.norm = weights.take("last_mixer.read"), Norm(weights.take("norm.weight"), config.eps)
        self.lm_head = Head(weights.matrix("lm_head"), config.vocab_size)

    def with_ops(self, ops: ToyReference) -> "ToyModel":
        other = copy(self)
        other.ops = ops
        return other

    def forward(self, batch: Batch, cache: Cache, capture: list[Tensor] | None = None) -> Tensor:
        ops = self.ops
        x, rotation = ops.begin(batch.tokens, batch.positions, self.embed, self.rotary, self.layers[0].norm)
        streams = x.value[:, None].expand(-1, 2, -1)
        step = Step(batch, cache, rotation, None)
        for layer in self.layers:
            streams, selection = layer(ops, streams, step)
            if capture is not None and selection is not None:
                capture.append(selection)
        return ops.normalize(ops.mix(streams, self.read, self.norm), self.norm)

    def logits(self, rows: Tensor) -> Tensor:
        return self.ops.logits(rows, self.lm_head)

    def find_logits(self, batch: Batch, cache: Cache) -> Tensor:
        return self.logits(self.forward(batch, cache))
