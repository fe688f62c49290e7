"""The block operations in plain torch, on any device: the specification, and what runs on a CPU.

Each is a few lines of the primitives of kernels/reference.py, in fp32. In steps that round, inputs of products are
rounded as the kernels round them, but for the router's and the head's. Where ranks meet, `self.ranks` adds up or
gathers (parallel/ranks.py). Knows tensors only: no layers, no requests. Next: gpu.py, the same as kernels.
"""

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple, Self

import torch
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels import reference as plain
from saccade.kernels.indexer import pools
from saccade.kernels.types import (
    CacheRows,
    Chosen,
    IndexKeys,
    Latents,
    Matrix,
    Mlp,
    Norm,
    Pooling,
    Rotation,
    Routing,
    Selection,
)
from saccade.models.parameters import share, share_experts
from saccade.ops.interface import (
    Embedding,
    Fused,
    Head,
    IndexerShape,
    Moe,
    QueryWeights,
    Residual,
    Rotary,
    Routed,
)
from saccade.ops.step import Batch, Step
from saccade.parallel.ranks import ONE_RANK, Ranks


class Queries(NamedTuple):
    """What scores latents, and what scores index keys."""

    attention: Tensor  # f32 [T, heads, nope + rope], not rotated yet
    scoring: Tensor | None  # f32 [T, index heads * dim], not rotated yet
    w_uk: Tensor


class HasActivations:
    """What rounds inputs of products in steps that round."""

    activations: str

    def for_batch(self, batch: Batch) -> Self:
        """See Ops. The exact ones keep in the same objects whatever these keep in objects."""
        if batch.rounds or self.activations == "exact":
            return self
        exact = copy(self)
        exact.activations = "exact"
        return exact


class Reference(HasActivations):
    """Every operation as its formula says."""

    kernels = "reference"

    def __init__(self, ranks: Ranks = ONE_RANK, activations: str = "exact") -> None:
        """`ranks`: that compute the model together. `activations`: what products of a step that rounds see of their
        inputs."""
        self.ranks, self.activations = ranks, activations

    def _linear(self, x: Tensor, w: Matrix) -> Tensor:
        """x [T, k] @ w.T."""
        return plain.linear(x, w, activations=self.activations)

    def begin(
        self, tokens: Tensor, positions: Tensor, embedding: Embedding, rotary: Rotary, following: Norm
    ) -> tuple[Residual, Rotation]:
        # fp32 from here on: against bf16 the error of auto falls 1.5 to 16 times, for 28 kB a token (docs/log.md).
        return Residual(embed(tokens, embedding, self.ranks), following), rotary(positions)

    def begin_draft(
        self, embedded: Residual, norm: Norm, hidden: Tensor, hidden_norm: Norm, w: Matrix, following: Norm
    ) -> Residual:
        both = torch.cat([self.normalize(embedded, norm), plain.rms_norm(hidden, *hidden_norm)], dim=1)
        return Residual(self._linear(both, w), following)

    def select_all(self, positions: Tensor, width: int) -> Selection:
        return plain.select_all(positions, width)

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        h = self.normalize(x, norm)
        products = [plain.linear(h, w.matrix) if w.is_exact else self._linear(h, w.matrix) for w in weights]
        return [part for w, y in zip(weights, products, strict=True) for part in y.split(w.rows, dim=1)]

    def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> Queries:
        widths = [len(weights.norm.weight), len(rows.kv_norm.weight), 2 * step.rotation.cos.shape[1]]
        q, latent, k_rope = low.split(widths, dim=1)
        latent = torch.cat([plain.rms_norm(latent, *rows.kv_norm), plain.rotate(k_rope, step.rotation, True)], dim=1)
        plain.write_latents(rows.latent, step.batch.slots, latent)  # [T, kv_lora + rope]
        if rows.key is not None and rows.key_norm is not None and rows.keys is not None:
            self.write_keys(step, rows.key, rows)
        q = plain.rms_norm(q, *weights.norm)
        heads = self._linear(q, weights.q_b).unflatten(1, (len(weights.w_uk), -1))
        scoring = None if weights.wq_b is None else self._linear(q, weights.wq_b)
        return Queries(heads, scoring, weights.w_uk)

    def write_keys(self, step: Step, key: Tensor, rows: CacheRows) -> None:
        """Norm and angles of index keys, then into their pool; a family with another norm overrides it."""
        norm, keys = rows.key_norm, rows.keys
        assert norm is not None and keys is not None
        k = plain.layer_norm(key, norm.weight, norm.bias, norm.eps)
        k, slots = self.rotate_index(k, step.rotation, norm.is_interleaved), step.batch.slots  # fp32: [T, dim]
        if rows.pooling is not None:
            k, slots = self.pool_keys(step, k, rows.pooling)
        self.store_keys(k, slots, keys)

    def pool_keys(self, step: Step, k: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
        """Keys of the pools that end with a token, and where they go; -1 where none ends."""
        batch = step.batch
        assert batch.state_slots is not None
        place = torch.where(batch.slots >= 0, batch.state_slots[batch.request], 0)
        first, last = batch.positions[batch.query_start[:-1]], batch.seq_lens - 1
        pooled = pools.pool_keys(k, pooling, batch.positions, first[batch.request], place)
        pools.keep_recent(k, pooling, batch.positions, last[batch.request], place)
        is_complete = (batch.positions + 1) % pooling.size == 0
        return pooled, torch.where(is_complete & (batch.slots >= 0), batch.slots // pooling.size, -1)

    def store_keys(self, k: Tensor, slots: Tensor, keys: IndexKeys) -> None:
        if keys.scales is not None:
            k, scales = plain.quantize_rows(k)
            plain.write_rows(keys.scales, slots, scales)
        plain.write_rows(keys.data, slots, k)

    def rotate_index(self, x: Tensor, rotation: Rotation, is_interleaved: bool) -> Tensor:
        """RoPE on the first dimensions of index queries and keys (MLA: on the last): the last thing done to them."""
        rope = 2 * rotation.cos.shape[1]
        return torch.cat([plain.rotate(x[..., :rope], rotation, is_interleaved), x[..., rope:]], dim=-1)

    def score(self, step: Step, queries: Queries, weights: Tensor, rows: CacheRows, index: IndexerShape) -> Tensor:
        assert queries.scoring is not None and rows.keys is not None, "no index queries were asked for"
        q = queries.scoring.unflatten(1, (index.heads, index.dim))
        q, weights = self.rotate_index(q, step.rotation, index.is_interleaved), weights * index.scale
        if rows.keys.scales is not None:
            q, scales = plain.quantize_rows(q)
            weights = weights * scales  # [T, heads]
        elif self.activations != "exact":
            q = q.bfloat16().float()
        where = step.batch.page_table, step.batch.request, find_last_pool(step.batch.positions, index)
        page = PAGE // index.pool
        return plain.index_logits(q, weights, rows.keys.data, *where, key_scales=rows.keys.scales, page=page)

    def select(self, step: Step, logits: Tensor, queries: Queries, index: IndexerShape) -> tuple[Selection, Queries]:
        positions = step.batch.positions
        found = plain.select(logits, find_last_pool(positions, index), index.topk // index.pool)
        return found if index.pool == 1 else pools.expand_pools(found, positions, index.pool), queries

    def attend(
        self, step: Step, queries: Queries, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
    ) -> Tensor:
        q_nope, q_rope = queries.attention.split([queries.w_uk.shape[1], 2 * step.rotation.cos.shape[1]], dim=2)
        absorbed = self._per_head(q_nope, queries.w_uk.transpose(1, 2))  # [T, heads, kv_lora]
        q = torch.cat([absorbed, plain.rotate(q_rope, step.rotation, True)], dim=2)
        seen = self.attend_latents(step, q, selection, latent, scale, w_uv.shape[2])
        return self._per_head(seen, w_uv).flatten(1)  # [T, heads * v]

    def _per_head(self, x: Tensor, w: Tensor) -> Tensor:
        """[T, heads, n] = x [T, heads, k] @ w [heads, n, k].T, each head by its own matrix."""
        return plain.linear(x.transpose(0, 1), Matrix(w), activations=self.activations).transpose(0, 1)

    def attend_latents(
        self, step: Step, q: Tensor, selection: Selection, latent: Latents, scale: float, width: int
    ) -> Tensor:
        """[T, heads, width] of absorbed queries [T, heads, kv_lora + rope]; for who wants to see the attention."""
        return plain.sparse_attention(q, latent, step.batch.page_table, step.batch.request, selection, scale, width)

    def add_projection(self, x: Residual, seen: Tensor, w: Matrix, following: Norm) -> Residual:
        return self.add_over_ranks(x, self._linear(seen, w), following)

    def add_mlp(self, x: Residual, norm: Norm, mlp: Mlp, following: Norm) -> Residual:
        h = self.normalize(x, norm)
        return self.add_over_ranks(x, plain.gated_mlp(h, *mlp, activations=self.activations), following)

    def route(self, x: Residual, norm: Norm, moe: Moe) -> Routed:
        h = self.normalize(x, norm)
        routing = find_routing(moe, self.ranks)
        return Routed(self.choose_experts(plain.linear(h, moe.router, torch.float32), routing), h)

    def add_experts(self, x: Residual, norm: Norm, routed: Routed, moe: Moe, following: Norm) -> Residual:
        h, how = routed.value, self.activations
        mixture = plain.expert_mlp(h, *routed.chosen, moe.gate_up, moe.down, moe.limit, how)
        return self.add_over_ranks(x, mixture + plain.gated_mlp(h, *moe.shared, activations=how), following)

    def add_over_ranks(self, x: Residual, part: Tensor, following: Norm) -> Residual:
        """x + the sum of every rank's `part` [T, hidden]: the one way in which operations add to the residual."""
        return Residual(x.value + self.ranks.add_up(part), following)

    def normalize(self, x: Residual, norm: Norm) -> Tensor:
        return plain.rms_norm(x.prepared_for(norm), *norm)

    def logits(self, rows: Tensor, head: Head) -> Tensor:
        return self.ranks.gather(plain.linear(rows, head.matrix, torch.float32), head.vocab)

    def project_head(self, x: Residual, norm: Norm, head: Head) -> Tensor:
        return self.logits(self.normalize(x, norm), head)

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        return plain.choose_experts(logits, routing)


def embed(tokens: Tensor, embedding: Embedding, ranks: Ranks) -> Tensor:
    """f32 [T, hidden]: each rank looks up the tokens of its share, others are zeros, and all are added up."""
    if ranks.layout.tp == 1:
        return embedding.rows[tokens].float()
    first, last = share(embedding.vocab, ranks.layout.tp, ranks.layout.rank)
    is_own = (tokens >= first) & (tokens < last)
    part = embedding.rows[torch.where(is_own, tokens - first, 0)].float()
    return ranks.add_up(torch.where(is_own[:, None], part, 0.0))


def find_routing(moe: Moe, ranks: Ranks) -> Routing:
    """The mixture's routing, which knows this rank's experts."""
    if ranks.layout.ep == 1:
        return moe.routing
    return moe.routing._replace(own=share_experts(len(moe.router.data), ranks.layout))


def find_last_pool(positions: Tensor, index: IndexerShape) -> Tensor:
    """Of each token, the last pool of keys that is complete; -1 for none. Without pools its own position."""
    return positions if index.pool == 1 else (positions + 1) // index.pool - 1
