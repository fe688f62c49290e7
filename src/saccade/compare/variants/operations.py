"""Operations of the model, overridden one or two at a time: what engines do otherwise, on purpose or by mistake.

Each class leaves all else to the next one, so that several combine by inheritance (table.py). Those that need a number
are made by a function of it. Knows no server and no prompt. Next: table.py, which names them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.checkpoint.write import E4M3_MAX
from saccade.eval.arrangements import ArrangedReference, Arrangement, Projection, project_fp32
from saccade.kernels import reference as plain
from saccade.kernels.reference import LEAST_AMAX, decode, read_latents, rotate, write_latents
from saccade.kernels.types import CacheRows, Chosen, Latents, Matrix, Mlp, Norm, Rotation, Routing, Selection
from saccade.models.dsa.transformer import Transformer
from saccade.ops.interface import Fused, Head, IndexerShape, Moe, QueryWeights, Residual, Routed
from saccade.ops.reference import Queries, Reference
from saccade.ops.step import Step

LATENT_GROUP = 128  # numbers of a latent that share a scale in FP8 caches (vLLM's fp8_ds_mla)


class Rounded(Reference):
    """BF16 engines: inputs of products and the residual stream are rounded to 16 bits."""

    def normalize(self, x: Residual, norm: Norm) -> Tensor:
        return to_bf16(super().normalize(x, norm))

    def add_over_ranks(self, x: Residual, part: Tensor, following: Norm) -> Residual:
        return Residual(to_bf16(x.value + to_bf16(part)), following)

    def attend(
        self, step: Step, queries: Queries, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
    ) -> Tensor:
        queries = queries._replace(attention=to_bf16(queries.attention))
        return to_bf16(super().attend(step, queries, selection, latent, w_uv, scale))


class QuantizedInputs(Rounded):
    """FP8 engines: inputs of FP8 products in e4m3 with a scale for 128 numbers; what is stored in BF16 stays so."""

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        return Reference.project(Eights(self), x, norm, weights)  # type: ignore[arg-type]

    def add_projection(self, x: Residual, seen: Tensor, w: Matrix, following: Norm) -> Residual:
        return super().add_projection(x, round_groups(seen), w, following)

    def add_mlp(self, x: Residual, norm: Norm, mlp: Mlp, following: Norm) -> Residual:
        return Reference.add_mlp(Eights(self), x, norm, mlp, following)  # type: ignore[arg-type]

    def route(self, x: Residual, norm: Norm, moe: Moe) -> Routed:
        routed = super().route(x, norm, moe)
        return Routed(routed.chosen, round_groups(routed.value))


class Eights:
    """Operations whose normalised inputs are FP8."""

    def __init__(self, ops: Rounded) -> None:
        self._ops = ops

    def normalize(self, x: Residual, norm: Norm) -> Tensor:
        return round_groups(self._ops.normalize(x, norm))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)


class FlippedIndexRotation(Reference):
    """The indexer's RoPE turns neighbours where it should turn halves, or the other way round."""

    def rotate_index(self, x: Tensor, rotation: Rotation, is_interleaved: bool) -> Tensor:
        return super().rotate_index(x, rotation, not is_interleaved)


class UnrotatedIndex(Reference):
    """No RoPE in the indexer."""

    def rotate_index(self, x: Tensor, rotation: Rotation, is_interleaved: bool) -> Tensor:
        return x


class FlippedRotation(Reference):
    """MLA's RoPE turns halves where it should turn neighbours, in queries and in cached keys."""

    def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> Queries:
        queries, slots, n = super().make_queries(step, low, weights, rows), step.batch.slots, len(rows.kv_norm.weight)
        rope = 2 * step.rotation.cos.shape[1]
        turned = rotate(low[:, low.shape[1] - rope :], step.rotation, False)
        write_latents(rows.latent, slots, torch.cat([read_latents(rows.latent, slots)[:, :n], turned.float()], dim=1))
        return queries

    def attend(
        self, step: Step, queries: Queries, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
    ) -> Tensor:
        rope = 2 * step.rotation.cos.shape[1]
        plain, turning = queries.attention.split([queries.attention.shape[2] - rope, rope], dim=2)
        turned = rotate(turning, step.rotation, False)
        back = rotate(turned, step.rotation._replace(sin=-step.rotation.sin), True)  # `attend` turns neighbours again
        scale_of_angles = (step.rotation.cos.square() + step.rotation.sin.square())[:, :1, None]
        return super().attend(
            step,
            queries._replace(attention=torch.cat([plain, back / scale_of_angles], 2)),
            selection,
            latent,
            w_uv,
            scale,
        )


class Everything(Reference):
    """Dense attention: no selection."""

    def select(self, step: Step, logits: Tensor, queries: Queries, index: IndexerShape) -> tuple[Selection, Queries]:
        return self.select_all(step.batch.positions, logits.shape[1]), queries


class MostRecent(Reference):
    """The last `index_topk` tokens, whatever the indexer says."""

    def select(self, step: Step, logits: Tensor, queries: Queries, index: IndexerShape) -> tuple[Selection, Queries]:
        places = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
        return super().select(step, torch.where(logits == float("-inf"), logits, places), queries, index)


def round_latents(latent: Callable[[Tensor], Tensor], rotated: Callable[[Tensor], Tensor]) -> type[Reference]:
    """A cache of other numbers: `latent` rounds latents [T, kv_lora], `rotated` the rotated keys [T, rope]."""

    class RoundedLatents(Reference):
        def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> Queries:
            queries, slots = super().make_queries(step, low, weights, rows), step.batch.slots
            sizes = [len(rows.kv_norm.weight), 2 * step.rotation.cos.shape[1]]
            kept, keys = read_latents(rows.latent, slots).split(sizes, dim=1)
            write_latents(rows.latent, slots, torch.cat([latent(kept), rotated(keys)], dim=1))
            return queries

    return RoundedLatents


def round_index(change: Callable[[Tensor], Tensor]) -> type[Reference]:
    """Index queries and keys as `change` leaves them."""

    class RoundedIndex(Reference):
        def rotate_index(self, x: Tensor, rotation: Rotation, is_interleaved: bool) -> Tensor:
            return change(super().rotate_index(x, rotation, is_interleaved))

    return RoundedIndex


def scale_softmax(factor: float) -> type[Reference]:
    """Another softmax scale."""

    class Scaled(Reference):
        def attend(
            self, step: Step, queries: Queries, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
        ) -> Tensor:
            return super().attend(step, queries, selection, latent, w_uv, scale * factor)

    return Scaled


def select_other(count: int) -> type[Reference]:
    """Another number of selected tokens."""

    class Counted(Reference):
        def select_all(self, positions: Tensor, width: int) -> Selection:
            return None  # type: ignore[return-value]  # no shortcut where the model's own number of tokens fits

        def select(
            self, step: Step, logits: Tensor, queries: Queries, index: IndexerShape
        ) -> tuple[Selection, Queries]:
            return super().select(step, logits, queries, index._replace(topk=count))

    return Counted


def change_routing(change: Callable[[Routing], Routing]) -> type[Reference]:
    """Experts chosen by another rule."""

    class ChangedRouting(Reference):
        def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
            return super().choose_experts(logits, change(routing))

    return ChangedRouting


def change_norms(eps: float) -> type[Reference]:
    """RMS norms with another eps."""

    class ChangedNorms(Reference):
        def normalize(self, x: Residual, norm: Norm) -> Tensor:
            return plain.rms_norm(x.prepared_for(norm), norm.weight, eps)

        def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> Queries:
            weights = weights._replace(norm=weights.norm._replace(eps=eps))
            rows = rows._replace(kv_norm=rows.kv_norm._replace(eps=eps))
            return super().make_queries(step, low, weights, rows)

    return ChangedNorms


class QuantizedHead(Reference):
    """The head's weights in FP8, a scale for each row."""

    def logits(self, rows: Tensor, head: Head) -> Tensor:
        weight = decode(head.matrix)
        return super().logits(rows, head._replace(matrix=Matrix(round_groups(weight, weight.shape[1]))))


def lose_scales(model: Transformer, lost: Mapping[int, Projection]) -> type[Reference]:
    """`lost`: by layer, what is computed in place of the indexer's projection."""

    class Lost(ArrangedReference):
        def __init__(self) -> None:
            super().__init__(model, lost, Arrangement("lost", project_fp32))

    return Lost


class NoSharedExperts(Reference):
    """Routed experts alone."""

    def add_experts(self, x: Residual, norm: Norm, routed: Routed, moe: Moe, following: Norm) -> Residual:
        mixture = plain.expert_mlp(routed.value, *routed.chosen, moe.gate_up, moe.down, moe.limit)
        return self.add_over_ranks(x, mixture, following)


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def cast_to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def round_groups(x: Tensor, group: int = LATENT_GROUP) -> Tensor:
    """Each `group` of numbers of a row in e4m3 with one scale, as numbers again."""
    if x.shape[-1] % group:
        group = x.shape[-1]
    groups = x.float().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX) / E4M3_MAX
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)
