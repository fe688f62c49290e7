"""Ways in which an engine may compute a checkpoint, right and wrong: THE table of what can be recognised by numbers.

Each is the reference with one or two operations overridden. Roundings and formats are what engines do on purpose;
faults are what they did by mistake. Knows no server and no prompt. Next: scoring.py, which runs one over tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.write import E4M3_MAX
from saccade.eval.arrangements import ArrangedReference, Arrangement, Projection, project_fp32, turn_and_round
from saccade.kernels import reference as plain
from saccade.kernels.reference import LEAST_AMAX, read_latents, rotate, write_latents
from saccade.kernels.types import CacheRows, Chosen, Latents, Matrix, Norm, Rotation, Routing, Selection
from saccade.models.dsa.transformer import Transformer
from saccade.ops.interface import Fused, IndexerShape, Mlp, Moe, Ops, QueryWeights, Residual, Routed
from saccade.ops.reference import Queries, Reference
from saccade.ops.step import Step

LATENT_GROUP = 128  # numbers of a latent that share a scale in FP8 caches (vLLM's fp8_ds_mla)


class Variant(NamedTuple):
    """One way to compute the model."""

    kind: str  # "exact", "rounding", "format" or "fault"
    name: str  # a short slug
    text: str  # what the engine does, for people
    make: Callable[[Transformer], Ops]
    index_cache: str = "bf16"  # how index keys are cached
    cache_dtype: str = "float32"  # in which numbers all else is cached


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


class RoundedLatents(Reference):
    """FP8 latents: 128 numbers share a scale, rotated keys stay in BF16."""

    def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> Queries:
        queries, slots = super().make_queries(step, low, weights, rows), step.batch.slots
        kept = read_latents(rows.latent, slots)
        latent, rotated = kept.split([len(rows.kv_norm.weight), 2 * step.rotation.cos.shape[1]], dim=1)
        write_latents(rows.latent, slots, torch.cat([round_groups(latent, LATENT_GROUP), to_bf16(rotated)], dim=1))
        return queries


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


class Scaled(Reference):
    """Another softmax scale."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def attend(
        self, step: Step, queries: Queries, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
    ) -> Tensor:
        return super().attend(step, queries, selection, latent, w_uv, scale * self._factor)


class ChangedRouting(Reference):
    """Experts chosen by another rule."""

    def __init__(self, change: Callable[[Routing], Routing]) -> None:
        super().__init__()
        self._change = change

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        return super().choose_experts(logits, self._change(routing))


class NoSharedExperts(Reference):
    """Routed experts alone."""

    def add_experts(self, x: Residual, norm: Norm, routed: Routed, moe: Moe, following: Norm) -> Residual:
        mixture = plain.expert_mlp(routed.value, *routed.chosen, moe.gate_up, moe.down, moe.limit)
        return self.add_over_ranks(x, mixture, following)


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def round_groups(x: Tensor, group: int = LATENT_GROUP) -> Tensor:
    """Each `group` of numbers of a row in e4m3 with one scale, as numbers again."""
    if x.shape[-1] % group:
        group = x.shape[-1]
    groups = x.float().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX) / E4M3_MAX
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


AS_STORED = Variant("exact", "exact", "computes what the checkpoint says, in fp32", lambda model: Reference())
BF16 = Variant("rounding", "bf16", "rounds activations and cache to BF16", lambda model: Rounded(), "bf16", "auto")
FP8 = Variant(
    "rounding", "fp8", "rounds inputs of products to FP8, all else to BF16", lambda model: QuantizedInputs(), "bf16",
    "auto",
)  # fmt: skip


def list_hypotheses(model: Transformer, projections: Mapping[int, Projection]) -> Iterator[Variant]:
    """What is tried to explain a difference. `projections`: of the indexers, as the checkpoint stores them."""
    yield Variant("format", "fp8-index-keys", "caches index keys in FP8", lambda m: Reference(), "fp8")
    turned = Arrangement("turned", project_fp32, turn_and_round)
    yield Variant(
        "format", "fp8-index-keys-rotated", "caches index keys in FP8, Hadamard-rotated first",
        lambda m: ArrangedReference(m, projections, turned),
    )  # fmt: skip
    yield Variant("format", "fp8-latents", "caches latents in FP8", lambda m: RoundedLatents())
    yield Variant(
        "fault", "index-rope-layout", "turns the wrong pairs in the indexer's RoPE", lambda m: FlippedIndexRotation()
    )
    yield Variant("fault", "index-rope-missing", "has no RoPE in the indexer", lambda m: UnrotatedIndex())
    yield Variant("fault", "rope-layout", "turns the wrong pairs in MLA's RoPE", lambda m: FlippedRotation())
    yield Variant("fault", "dense", "attends to every token: the indexer is not used", lambda m: Everything())
    yield Variant("fault", "recent", "attends to the most recent tokens only", lambda m: MostRecent())
    plain = (model.config.qk_nope_head_dim + model.config.qk_rope_head_dim) ** -0.5
    if abs(model.config.softmax_scale / plain - 1) > 1e-3:
        factor = plain / model.config.softmax_scale
        yield Variant("fault", "yarn-scale", "leaves YaRN's factor out of the softmax scale", lambda m: Scaled(factor))
    if any(model.config.is_sparse(i) for i in range(model.config.num_hidden_layers)):
        yield Variant(
            "fault", "router-bias", "chooses experts without e_score_correction_bias",
            lambda m: ChangedRouting(lambda r: r._replace(bias=torch.zeros_like(r.bias))),
        )  # fmt: skip
        if model.config.routed_scaling_factor != 1:
            yield Variant(
                "fault", "routed-scaling", "leaves routed_scaling_factor out",
                lambda m: ChangedRouting(lambda r: r._replace(scaling=1.0)),
            )  # fmt: skip
        yield Variant("fault", "shared-experts", "leaves the shared experts out", lambda m: NoSharedExperts())
    yield from list_lost_scales(projections)


def list_lost_scales(projections: Mapping[int, Projection]) -> Iterator[Variant]:
    """Scales of `wk` taken as 1: in all layers, or in one."""
    lost = {
        layer: p._replace(wk=p.wk._replace(scale=torch.ones_like(p.wk.scale)))
        for layer, p in projections.items()
        if p.wk.scale is not None and p.wk.scale.unique().numel() > 1  # the layer norm hides a common factor
    }
    arranged = Arrangement("lost", project_fp32)

    def make(changed: dict[int, Projection]) -> Callable[[Transformer], Ops]:
        return lambda m: ArrangedReference(m, changed, arranged)

    if len(lost) > 1:
        yield Variant("fault", "wk-scales", "takes the FP8 scales of every wk as 1", make(lost))
    for layer, projection in lost.items():
        name = f"model.layers.{layer}.self_attn.indexer.wk"
        yield Variant("fault", f"wk-scales-{layer}", f"takes the FP8 scales of {name} as 1", make({layer: projection}))
