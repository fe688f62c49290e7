"""The table: which kernel serves which operation at which number of tokens.

The borders are GEMV_TOKENS (2), ATTEND_TOKENS (8), DECODE_TOKENS (16), TILE_TOKENS (24), PAIR_TOKENS (32)
and SPLIT_TOKENS (64) of kernels/types.py. Files are below kernels/.

| operation | 1 and 2 tokens | 3 to 16 | 17 to 64 | more |
|---|---|---|---|---|
| begin | embed, prepared | embed | embed | embed |
| begin_draft | 1: linear/gemv, prepared. 2: as 3 | linear/split_k | linear/split_k | linear/gemm |
| project, logits | linear/gemv (1) | linear/split_k | linear/split_k | linear/gemm |
| make_queries | attention/queries: gemv, cache_rows | cache_rows, linear/split_k | as 3 to 16 | cache_rows |
| score (2) | indexer/logits | indexer/logits | indexer/logits | linear/gemm before (7) |
| select | indexer/select with absorption | as 1 and 2 | as 1 and 2 | indexer/select |
| attend | attention/sparse_decode | as 1 and 2 (10) | (3), linear/head_gemm | linear/gemm, head_gemm before |
| add_projection | linear/gemv, prepared | linear/split_k | linear/split_k | linear/gemm |
| add_mlp | moe/gate_up, moe/down, prepared | linear/split_k | linear/split_k | linear/gemm |
| route (4) | linear/gemv (1), moe/router | linear/split_k, moe/router | as 3 to 16 | linear/gemm, moe/router |
| add_experts: BF16, FP8 128x128 | moe/gate_up, moe/down, prepared | not prepared | (8) | (8), (9) |
| add_experts: 4-bit codes | moe/packed (6) | moe/packed (6) | grouped (5) | grouped (5) |
| add_experts: other codes | grouped (6) | grouped (6) | grouped (5) | grouped (5) |

Latents in FP8 are read as codes by every kernel of `attend` (attention/latents.py).
Index keys of pools are written by indexer/pool_rows.py, in the launch of cache_rows; indexer/logits and indexer/select
take pools as a setting. A family's own operations have their rows beside them: models/glm5_next/gpu.py.
"Grouped" is moe/grouped_gemm. "Prepared": the kernel also writes what the next norm needs (kernels/residual.py).
(1) Two tokens times 32 MiB of weights or more: linear/split_k.
(2) Up to 256 requests of one token each, a program scores one token, and the keys are divided into about 256 programs.
(3) Above 256 tokens, and in all steps that round, attention/masked where it takes the shapes and GATHERED_POSITIONS of
kernels/types.py says so; else
attention/dense if the selection holds the whole context; else attention/sparse_prefill where that takes the shapes,
and attention/sparse_decode where it does not. Up to 256 tokens several programs share a selection. On a Hopper, for
caches in BF16 and up to 16 heads, sparse_prefill launches the kernel of attention/sparse_hopper.
(4) If the experts are neither BF16, F32 nor FP8 blocks, 1 and 2 tokens are routed as 3 to 16.
(5) The shared experts as products: by linear/split_k up to 64 tokens, where the router's launch multiplies their gate
and up; by linear/gemm above; not those of (8). (6) The shared experts by moe/gate_up and moe/down.
(7) Queries of FP8 keys, and rounded ones, by indexer/queries; above 256 tokens rounded ones are scored by
indexer/prompt_logits. (8) Up to 32 tokens as 3 to 16, then grouped (5).
But above TILE_TOKENS FP8 experts of MEAN_PAIRS pairs at most (4 on average; 128 tokens of DeepSeek-V3.2), inputs exact,
by moe/few_pairs, which also takes a shared expert of the same size. (9) Inputs in FP8 by moe/fp8_experts.
(10) Above 8 as 17 to 64 where sparse_prefill takes the shapes.

What several ranks add up or gather goes through `Gpu.add_over_ranks` and `Gpu.ranks` (parallel/ranks.py).

In steps that round, the kernels of "more" serve any number of tokens.

The borders were measured on an H200: `python -m tools.kernel_bench.batch` prints both sides of each.

No step reads a number back to the host, and no shape depends on one, so every step can be captured in a CUDA graph.
What no kernel reads is computed as kernels/reference.py says. Launches overlap by programmatic dependent launch
(kernels/launch.py). The specification is ops/reference.py; tests compare the two. Knows no layers and no requests.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.kernels import PAGE
from saccade.kernels import reference as plain
from saccade.kernels import types as borders
from saccade.kernels.activations import Activations, Formats, prepare_activations, write_activations
from saccade.kernels.attention import sparse_decode
from saccade.kernels.attention.cache_rows import Placed
from saccade.kernels.attention.dense import dense_attention
from saccade.kernels.attention.masked import can_be_masked, has_room, is_masking_faster, masked_attention
from saccade.kernels.attention.queries import prepare_queries, project_queries
from saccade.kernels.attention.sparse_prefill import attend_in_parts, is_taken
from saccade.kernels.embed import embed_with_angles
from saccade.kernels.indexer.logits import index_logits
from saccade.kernels.indexer.pool_rows import Requests
from saccade.kernels.indexer.prompt_logits import can_score_prompts, score_prompt
from saccade.kernels.indexer.queries import write_index_queries
from saccade.kernels.indexer.select import absorb, select, select_and_absorb
from saccade.kernels.linear.gemm import find_formats, run_gemm
from saccade.kernels.linear.gemv import run_gemv as gemv
from saccade.kernels.linear.gemv import run_gemv_into as gemv_into
from saccade.kernels.linear.head_gemm import multiply_heads
from saccade.kernels.linear.split_k import LONG_BYTES, split_k, split_k_and_input
from saccade.kernels.moe import few_pairs, grouped_gemm, router
from saccade.kernels.moe.down import run_down, run_down_into
from saccade.kernels.moe.gate_up import run_gate_up
from saccade.kernels.moe.packed import packed_experts
from saccade.kernels.residual import Input, PreparedResidual, get_values, prepare_residual
from saccade.kernels.types import (
    ATTEND_TOKENS,
    CAPTURED_TOKENS,
    DECODE_TOKENS,
    GEMV_TOKENS,
    MIXED_TOKENS,
    CacheRows,
    Chosen,
    Latents,
    Matrix,
    Mlp,
    Norm,
    Parts,
    Rotation,
    Routing,
    Selection,
)
from saccade.models.parameters import share
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
from saccade.ops.reference import HasActivations, find_routing
from saccade.ops.step import Step
from saccade.parallel.device import DeviceRanks
from saccade.parallel.ranks import ONE_RANK, Ranks

PACKED = ("e2m1", "int4", "uint4")  # codes of 4 bits
FP32, FP16 = Formats(fp32=True), Formats(fp16=True)


class GpuQueries(NamedTuple):
    """Queries as far as they are computed. Few tokens: products, then absorbed. Many: their input."""

    weights: QueryWeights
    attention: Tensor | None = None  # f32 [T, heads, nope + rope], not rotated yet
    scoring: Tensor | None = None  # f32 [T, index heads * dim], not rotated yet
    absorbed: Tensor | None = None  # f32 [T, heads, kv_lora + rope]: as they meet the latents
    written: Activations | None = None


class InputAndShared(NamedTuple):
    """What up to SPLIT_TOKENS tokens are routed with whose pairs will be sorted, the shared expert's not among them."""

    numbers: Tensor  # f32 [T, hidden], behind the norm
    gate_up: Tensor  # f32 [T, 2 n]: of the shared experts, multiplied in the router's launch


class Gpu(HasActivations):
    """Every operation by the kernel that is fastest for its number of tokens."""

    kernels = "fast"
    reads_ahead = False  # whether a block's kernels read, before they wait, what came in front of its attention

    def __init__(self, ranks: Ranks = ONE_RANK, activations: str = "exact") -> None:
        """`activations`: what products of a step that rounds see of their inputs. "exact" inputs keep 16 bits beside
        BF16 weights and 22 beside FP8 blocks; routed experts in BF16 keep 8 bits above PAIR_TOKENS tokens."""
        self.ranks, self.activations = ranks, activations
        self._zeros: dict[int, Tensor] = {}  # by width

    def are_many(self, tokens: int) -> bool:
        """Whether the kernels of many tokens serve so many: only those round."""
        return tokens > borders.SPLIT_TOKENS or self.activations != "exact"

    def begin(
        self, tokens: Tensor, positions: Tensor, embedding: Embedding, rotary: Rotary, following: Norm
    ) -> tuple[Residual, Rotation]:
        own = share(embedding.vocab, self.ranks.layout.tp, self.ranks.layout.rank)
        x, rotation = embed_with_angles(tokens, positions, embedding.rows, rotary.table, following, own[0])
        if self.ranks.layout.tp > 1:
            x = self._add_to(None, x, following)
        return Residual(x, following), rotation

    def begin_draft(
        self, embedded: Residual, norm: Norm, hidden: Tensor, hidden_norm: Norm, w: Matrix, following: Norm
    ) -> Residual:
        both = torch.cat(
            [self.normalize(embedded, norm), normalize_rows(hidden, hidden_norm)], dim=1
        )  # [T, 2 * hidden]
        # For two tokens eh_proj's 205 MB side by side would take 97 us instead of 58.
        if len(both) == 1 and not self.are_many(1):
            return Residual(gemv_into(both, w, torch.zeros_like(hidden), following), following)
        return Residual(multiply_any(both, w, activations=self.activations), following)

    def select_all(self, positions: Tensor, width: int) -> Selection:
        return plain.select_all(positions, width)

    def read(self, x: Residual, norm: Norm) -> Input:
        """The input of a block that begins with `norm`, which is still to be applied."""
        value: Input = x.prepared_for(norm)
        return value

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        value = self.read(x, norm)
        if self.are_many(len(get_values(value))):
            how = ["exact" if w.is_exact else self.activations for w in weights]
            forms = [find_formats(w.matrix, each) for w, each in zip(weights, how, strict=True)]
            written = prepare_activations(get_values(value), *forms, norm=norm)
            products = [run_gemm(written, w.matrix, each) for w, each in zip(weights, how, strict=True)]
            return [part for w, y in zip(weights, products, strict=True) for part in y.split(w.rows, dim=1)]
        together = multiply_few(value, [w.matrix for w in weights], norm)
        return list(together.split([n for w in weights for n in w.rows], dim=1))

    def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> GpuQueries:
        placed = Placed(rows, step.rotation, step.batch.slots, find_requests(step) if rows.pooling else None)
        parts = [weights.q_b] if weights.wq_b is None else [weights.q_b, weights.wq_b]
        if self.are_many(len(low)):
            forms = [find_formats(w, self.activations) for w in parts]
            return GpuQueries(weights, written=prepare_queries(low, weights.norm, forms, placed))
        both, heads = project_queries(low, weights.norm, parts, placed), len(weights.w_uk)
        width = weights.q_b.data.shape[0]
        return GpuQueries(weights, both[:, :width].unflatten(1, (heads, -1)), both[:, width:])

    def score(self, step: Step, queries: GpuQueries, weights: Tensor, rows: CacheRows, index: IndexerShape) -> Tensor:
        q, keys, batch = queries.scoring, rows.keys, step.batch
        if queries.written is not None and queries.weights.wq_b is not None:
            q = run_gemm(queries.written, queries.weights.wq_b, self.activations)
        assert q is not None and keys is not None, "no index queries were asked for"
        q, where = q.unflatten(1, (index.heads, index.dim)), (batch.page_table, batch.request, batch.positions)
        rounded = self.activations != "exact"
        if index.rope and (rounded or (keys.scales is not None and len(q) > borders.SPLIT_TOKENS)):
            dtype, shape = keys.data.dtype, (index.heads, index.dim, index.pool)
            written = write_index_queries(q, weights, step.rotation, index.is_interleaved, index.scale, dtype)
            if rounded and len(q) > CAPTURED_TOKENS and can_score_prompts(*shape, keys):
                return score_prompt(written, keys, *where)
            return index_logits(*written, keys.data, *where, key_scales=keys.scales, fills=False, pool=index.pool)
        if keys.scales is not None:
            turned = plain.rotate(q[..., : index.rope], step.rotation, index.is_interleaved)
            codes, scales = plain.quantize_rows(torch.cat([turned, q[..., index.rope :]], dim=-1))
            weights = weights * scales * index.scale
            return index_logits(codes, weights, keys.data, *where, key_scales=keys.scales, fills=False, pool=index.pool)
        return index_logits(
            q.bfloat16() if rounded else q, weights, keys.data, *where, rotation=step.rotation if index.rope else None,
            interleaved=index.is_interleaved, scale=index.scale, fills=False, pool=index.pool,
        )  # fmt: skip

    def select(
        self, step: Step, logits: Tensor, queries: GpuQueries, index: IndexerShape
    ) -> tuple[Selection, GpuQueries]:
        positions, q, k, pool = step.batch.positions, queries.attention, index.topk // index.pool, index.pool
        if q is None:
            return select(logits, positions, k, pool=pool), queries
        found, absorbed = select_and_absorb(logits, positions, k, q, queries.weights.w_uk, step.rotation, pool=pool)
        return found, queries._replace(absorbed=absorbed)

    def attend(
        self, step: Step, queries: GpuQueries, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
    ) -> Tensor:
        w_uk, where = queries.weights.w_uk, (step.batch.page_table, step.batch.request)
        if queries.written is not None:
            q = run_gemm(queries.written, queries.weights.q_b, self.activations).unflatten(1, (len(w_uk), -1))
            if self._masks(step, selection, latent, w_uk, w_uv):
                return masked_attention(
                    q, latent, step.batch.page_table, step.batch.seq_lens, step.batch.request, step.batch.positions,
                    selection, w_uk, w_uv, step.rotation, scale, self.activations,
                ).flatten(1)  # fmt: skip
            q = multiply_heads(q, w_uk, step.rotation, self.activations)  # [T, heads, kv_lora + rope]
            seen = attend_many(q, latent, *where, selection, scale, w_uv.shape[2])
            return multiply_heads(seen, w_uv.transpose(1, 2), activations=self.activations).flatten(1)
        q = queries.absorbed
        if q is None:
            assert queries.attention is not None
            q = absorb(queries.attention, w_uk, step.rotation)
        if len(q) > DECODE_TOKENS or (len(q) > ATTEND_TOKENS and is_taken(q.shape[1], latent, w_uv.shape[2])):
            return multiply_heads(
                attend_many(q, latent, *where, selection, scale, w_uv.shape[2]), w_uv.transpose(1, 2)
            ).flatten(1)
        how = sparse_decode.ATTEND_FEW if len(q) <= GEMV_TOKENS else sparse_decode.ATTEND
        how = how._replace(waits_first=self.reads_ahead)
        return sparse_decode.attend_values(q, latent, *where, selection, scale, w_uv, how)

    def _masks(self, step: Step, selection: Selection, latent: Latents, w_uk: Tensor, w_uv: Tensor) -> bool:
        """Whether this step's attention passes by all positions, with the selection as a mask. All that decides are
        shapes."""
        (requests, pages), tokens = step.batch.page_table.shape, len(step.batch.positions)
        if not can_be_masked(latent, w_uk, w_uv) or not has_room(requests * pages * PAGE, w_uk, w_uv):
            return False
        if self.activations != "exact":  # rounded keys are other ones: what a token gets is to be the same in any step
            return is_masking_faster(MIXED_TOKENS, 1, pages * PAGE, len(w_uk), self.activations)
        many = tokens > CAPTURED_TOKENS
        return many and is_masking_faster(tokens, requests, pages * PAGE, len(w_uk), self.activations)

    def add_projection(self, x: Residual, seen: Tensor, w: Matrix, following: Norm) -> Residual:
        base = self.find_base(x)
        few = base is not None and len(base) <= GEMV_TOKENS and not self.are_many(len(base))
        part = gemv_into(seen, w, base, following) if few else multiply_any(seen, w, base, self.activations)
        return self.add_over_ranks(x, part, following)

    def add_mlp(self, x: Residual, norm: Norm, mlp: Mlp, following: Norm) -> Residual:
        value, base = self.read(x, norm), self.find_base(x)
        before = get_values(value)
        part: Input
        if self.are_many(len(before)):
            written = prepare_activations(before, find_formats(mlp.gate_up, self.activations), norm=norm)
            part = add_gated(written, mlp, base, self.activations)
        elif isinstance(value, PreparedResidual):
            hidden = run_gate_up(value, norm, mlp.gate_up, limits=(mlp.limit, mlp.limit))
            part = run_down_into(base, hidden, mlp.down, None, None, following)
        else:
            both = split_k(before, [mlp.gate_up], norm)
            part = split_k(both, [mlp.down], residual=base, gated=True, limit=mlp.limit)
        return self.add_over_ranks(x, part, following)

    def route(self, x: Residual, norm: Norm, moe: Moe) -> Routed:
        value = self.read(x, norm)
        before = get_values(value)
        if self.are_many(len(before)):
            formats = [find_formats(moe.router), find_formats(moe.shared.gate_up, self.activations)]
            formats.append(grouped_gemm.find_expert_formats(moe.gate_up, moe.down, self.activations))
            written = prepare_activations(before, *formats, norm=norm)
            return self._keep_routed(run_gemm(written, moe.router), moe, written)
        if isinstance(value, PreparedResidual) and has_kernel(moe):
            return self._keep_routed(multiply_few(value, [moe.router], norm), moe, value)
        has_tiles = len(before) > borders.TILE_TOKENS and shares_tiles(moe, len(before))
        if has_tiles:
            logits, written = split_k_and_input(before, [moe.router], norm, keep=FP16)
            return self._keep_routed(logits, moe, written)
        if len(before) <= (borders.PAIR_TOKENS if has_kernel(moe) else DECODE_TOKENS):
            logits, h = split_k_and_input(before, [moe.router], norm, keep=FP32)
            return self._keep_routed(logits, moe, h.fp32)
        both, h = split_k_and_input(before, [moe.router, moe.shared.gate_up], norm, keep=FP32)
        logits, gate_up = both.split([w.data.shape[0] for w in (moe.router, moe.shared.gate_up)], dim=1)
        return self._keep_routed(logits, moe, InputAndShared(h.fp32, gate_up))

    def _keep_routed(self, logits: Tensor, moe: Moe, value: Input | Activations | InputAndShared) -> Routed:
        return Routed(self.choose_experts(logits, find_routing(moe, self.ranks)), value)

    def add_experts(self, x: Residual, norm: Norm, routed: Routed, moe: Moe, following: Norm) -> Residual:
        base, chosen, h, shared = self.find_base(x), routed.chosen, routed.value, moe.shared
        others = self.ranks.layout.ep > 1  # whether the experts of some tokens are other ranks'
        limit, limits = moe.limit, (shared.limit, moe.limit)
        part: Input
        if isinstance(h, Activations) and h.fp16.numbers.numel() and shares_tiles(moe, len(chosen[0])):
            part = few_pairs.add_few_pairs(h.fp16, base, *chosen, moe.gate_up, moe.down, limit, shared)
        elif isinstance(h, Activations):
            base = add_gated(h, shared, base, self.activations)
            part = grouped_gemm.add_experts(h, base, *chosen, moe.gate_up, moe.down, None, limit, self.activations)
        elif isinstance(h, InputAndShared):
            base = split_k(h.gate_up, [shared.down], residual=base, gated=True, limit=shared.limit)
            part = grouped_gemm.add_experts(h.numbers, base, *chosen, moe.gate_up, moe.down, limit=limit)
        elif isinstance(h, PreparedResidual):
            hidden = run_gate_up(h, norm, shared.gate_up, chosen[0], moe.gate_up, others=others, limits=limits)
            part = run_down_into(base, hidden, shared.down, chosen, moe.down, following, others=others)
        elif has_kernel(moe):
            hidden = run_gate_up(h, None, shared.gate_up, chosen[0], moe.gate_up, others=others, limits=limits)
            part = run_down(base, hidden, shared.down, chosen, moe.down, others=others)
        else:
            few = moe.gate_up.code in PACKED and moe.gate_up.scale is not None
            experts, weights = chosen[0].long(), chosen[1]
            if few:
                added = packed_experts(h, experts, weights, moe.gate_up, moe.down, others=others, limit=limit)
            else:
                added = grouped_gemm.expert_mlp(h, experts, weights, moe.gate_up, moe.down, limit=limit)
            part = run_down(base, run_gate_up(h, None, shared.gate_up, limits=limits), shared.down) + added
        return self.add_over_ranks(x, part, following)

    def find_base(self, x: Residual) -> Any:
        """f32 [T, hidden], to which a kernel adds its result: the residual; zeros where ranks add up their parts, or
        None for kernels of many tokens, which need none."""
        values = get_values(x.value)
        return values if self.ranks.layout.tp == 1 else self.find_zeros(values)

    def find_zeros(self, values: Tensor) -> Any:
        """For parts [T, hidden] like `values` that begin with nothing; None for many tokens."""
        if len(values) > borders.PAIR_TOKENS:
            return None
        width = values.shape[1]
        if width not in self._zeros:  # kept: a launch less for each sum
            self._zeros[width] = values.new_zeros(borders.PAIR_TOKENS, width)
        return self._zeros[width][: len(values)]

    def add_over_ranks(self, x: Residual, part: Input, following: Norm) -> Residual:
        """x + the sum of every rank's `part`, which began with `find_base(x)`: on one rank it is the whole already.
        Every sum over ranks but the embedding's goes through here."""
        if self.ranks.layout.tp == 1:
            return Residual(part, following)
        return Residual(self._add_to(get_values(x.value), part, following), following)

    def _add_to(self, before: Tensor | None, part: Input, following: Norm) -> Input:
        """`before` + the sum over ranks, in the launch of the sum where that is a kernel."""
        if isinstance(self.ranks, DeviceRanks):
            return self.ranks.add_into(before, get_values(part), following)
        total = self.ranks.add_up(get_values(part))
        return prepare_residual(total if before is None else before + total, following)

    def normalize(self, x: Residual, norm: Norm) -> Tensor:
        return normalize_rows(get_values(self.read(x, norm)), norm)

    def logits(self, rows: Tensor, head: Head) -> Tensor:
        return self.ranks.gather(multiply_any(rows, head.matrix), head.vocab)

    def project_head(self, x: Residual, norm: Norm, head: Head) -> Tensor:
        whole = Fused(head.matrix, (head.matrix.data.shape[0],), is_exact=True)
        return self.ranks.gather(self.project(x, norm, [whole])[0], head.vocab)

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        return router.choose_experts(logits, routing)


def multiply_few(
    x: Input, weights: Sequence[Matrix], norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """f32 [T, rows of all weights] = norm(x) @ w.T, side by side, plus `residual`, for up to SPLIT_TOKENS tokens."""
    tokens = len(get_values(x))
    if tokens == 1 or (tokens <= GEMV_TOKENS and sum(w.data.nbytes for w in weights) < LONG_BYTES):
        return gemv(x, weights, norm, residual)
    return split_k(get_values(x), weights, norm, residual)


def multiply_any(x: Tensor, w: Matrix, residual: Tensor | None = None, activations: str = "exact") -> Tensor:
    """f32 [T, rows] = x @ w.T, plus `residual`, for any number of tokens."""
    if len(x) <= borders.SPLIT_TOKENS and activations == "exact":
        return multiply_few(x, [w], residual=residual)
    return run_gemm(prepare_activations(x, find_formats(w, activations)), w, activations, residual)


def add_gated(h: Activations, mlp: Mlp, x: Tensor | None, activations: str = "exact") -> Tensor:
    """x + mlp(h), or mlp(h), of many tokens."""
    hidden = run_gemm(h, mlp.gate_up, activations)
    written = prepare_activations(hidden, find_formats(mlp.down, activations), gated=True, limit=mlp.limit)
    return run_gemm(written, mlp.down, activations, x)


def attend_many(
    q: Tensor, latent: Latents, page_table: Tensor, request: Tensor, selection: Selection, scale: float, width: int
) -> Tensor | Parts:
    """Absorbed MLA [T, heads, width] of many tokens, perhaps in parts; in prompts whose selection holds every position,
    they share what they read."""
    if len(q) > CAPTURED_TOKENS and selection.shape[1] == page_table.shape[1] * PAGE:
        return dense_attention(q, latent, page_table, request, (selection >= 0).sum(1) - 1, scale, width)
    if is_taken(q.shape[1], latent, width):
        return attend_in_parts(q, latent, page_table, request, selection, scale, width)
    return sparse_decode.sparse_attention(q, latent, page_table, request, selection, scale, width)


def normalize_rows(x: Tensor, norm: Norm) -> Tensor:
    """norm(x) of f32 [T, n], in one pass."""
    return write_activations(x, norm=norm, fp32=True).fp32 if len(x) else plain.rms_norm(x, *norm)


def find_requests(step: Step) -> Requests:
    """Of a family that has states."""
    batch = step.batch
    assert batch.state_slots is not None, "pooled keys without places for those of the latest tokens"
    return Requests(batch.request, batch.positions, batch.query_start, batch.seq_lens, batch.state_slots)


def shares_tiles(moe: Moe, tokens: int) -> bool:
    """Whether routed experts have few pairs of `tokens` tokens, and the shared one is multiplied among them."""
    if len(moe.gate_up.data) < len(moe.router.data):  # others' experts: a share of the pairs, and other shared rows
        return False
    pairs, routed = tokens * moe.routing.topk, (moe.gate_up, moe.down)
    return few_pairs.has_few_pairs(pairs, *routed) and few_pairs.can_be_beside(moe.shared, *routed)


def has_kernel(moe: Moe) -> bool:
    """Whether the experts are numbers, or FP8 by blocks: what moe/gate_up.py and moe/down.py read."""
    return all(w.scale is None or (w.code, w.group) == ("e4m3", (128, 128)) for w in (moe.gate_up, moe.down))
