"""Ways in which an engine may compute a checkpoint, right and wrong: THE table of what can be recognised by numbers.

Each is the reference with one or two operations overridden. Roundings and formats are what engines do on purpose;
faults are what they did by mistake. Knows no server and no prompt. Next: scoring.py, which runs one over tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from saccade.compare.variants.operations import (
    Everything,
    FlippedIndexRotation,
    FlippedRotation,
    MostRecent,
    NoSharedExperts,
    QuantizedHead,
    QuantizedInputs,
    Rounded,
    UnrotatedIndex,
    cast_to_fp8,
    change_norms,
    change_routing,
    lose_scales,
    round_groups,
    round_index,
    round_latents,
    scale_softmax,
    select_other,
    to_bf16,
)
from saccade.eval.arrangements import Projection, round_to_fp8, turn_and_round
from saccade.models.dsa.transformer import Transformer
from saccade.ops.interface import Ops
from saccade.ops.reference import Reference


class Variant(NamedTuple):
    """One way to compute the model."""

    kind: str  # "exact", "rounding", "format" or "fault"
    part: str  # what of the model differs; two variants of one part exclude each other
    name: str  # a short slug
    text: str  # what the engine does, for people
    overrides: tuple[type[Reference], ...] = ()
    cache_dtype: str = "float32"  # in which numbers is cached

    def make(self) -> Ops:
        """Its operations."""
        return type("Varied", (*self.overrides, Reference), {})()


AS_STORED = Variant("exact", "", "exact", "computes what the checkpoint says, in fp32")
BF16 = Variant("rounding", "", "bf16", "rounds activations and cache to BF16", (Rounded,), "auto")
FP8 = Variant("rounding", "", "fp8", "rounds inputs of products to FP8, all else to BF16", (QuantizedInputs,), "auto")
COMMON_EPS = 1e-6, 1e-5


def combine(variants: Sequence[Variant]) -> Variant:
    """All of them at once. What a cache holds is rounded after all else was done to it: formats come first."""
    ordered = sorted(variants, key=lambda variant: variant.kind != "format")
    names, texts = "+".join(v.name for v in variants), " and ".join(v.text for v in variants)
    overrides = tuple(override for variant in ordered for override in variant.overrides)
    return Variant(ordered[0].kind if ordered else "exact", "", names, texts, overrides)


def list_hypotheses(model: Transformer, projections: Mapping[int, Projection]) -> Iterator[Variant]:
    """What is tried to explain a difference. `projections`: of the indexers, as the checkpoint stores them."""
    yield from list_number_formats()
    config = model.config
    yield from list_plain(
        "fault",
        ("index-rope", "index-rope-layout", "turns the wrong pairs in the indexer's RoPE", FlippedIndexRotation),
        ("index-rope", "index-rope-missing", "has no RoPE in the indexer", UnrotatedIndex),
        ("rope", "rope-layout", "turns the wrong pairs in MLA's RoPE", FlippedRotation),
        ("selection", "dense", "attends to every token: the indexer is not used", Everything),
        ("selection", "recent", "attends to the most recent tokens only", MostRecent),
    )
    for name, count in (("half", config.index_topk // 2), ("twice", config.index_topk * 2)):
        text = f"selects {count} tokens, not {config.index_topk}"
        yield Variant("fault", "selection", f"index-topk-{name}", text, (select_other(count),))
    for eps in COMMON_EPS:
        if abs(config.rms_norm_eps / eps - 1) > 1e-3:
            text = f"adds {eps:g} to the squares of norms, not {config.rms_norm_eps:g}"
            yield Variant("fault", "norms", f"norm-eps-{eps:g}", text, (change_norms(eps),))
    plain = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if abs(config.softmax_scale / plain - 1) > 1e-3:
        scaled = scale_softmax(plain / config.softmax_scale)
        yield Variant("fault", "softmax", "yarn-scale", "leaves YaRN's factor out of the softmax scale", (scaled,))
    if any(config.is_sparse(i) for i in range(config.num_hidden_layers)):
        unbiased = change_routing(lambda routing: routing._replace(bias=torch.zeros_like(routing.bias)))
        text = "chooses experts without e_score_correction_bias"
        yield Variant("fault", "router", "router-bias", text, (unbiased,))
        if config.routed_scaling_factor != 1:
            unscaled = change_routing(lambda routing: routing._replace(scaling=1.0))
            yield Variant("fault", "router", "routed-scaling", "leaves routed_scaling_factor out", (unscaled,))
        yield Variant("fault", "experts", "shared-experts", "leaves the shared experts out", (NoSharedExperts,))
    yield from list_lost_scales(model, projections)


def list_number_formats() -> Iterator[Variant]:
    """In which numbers an engine keeps what the checkpoint has in others. Latents that share a scale of 128 are vLLM's
    fp8_ds_mla, those with a power of two each Saccade's latent_cache="fp8"."""
    powers, groups = round_latents(round_to_fp8, to_bf16), round_latents(round_groups, to_bf16)
    casts, turned = round_latents(cast_to_fp8, cast_to_fp8), round_index(turn_and_round)
    yield from list_plain(
        "format",
        ("index-keys", "fp8-index-keys", "caches index keys in FP8", round_index(round_to_fp8)),
        ("index-keys", "fp8-index-keys-rotated", "caches index keys in FP8, Hadamard-rotated first", turned),
        ("latents", "fp8-latents", "caches latents in FP8, a scale for each", powers),
        ("latents", "fp8-latents-grouped", "caches latents in FP8, a scale for 128 numbers", groups),
        ("latents", "fp8-latents-unscaled", "caches latents in FP8 without scales, RoPE included", casts),
        ("head", "fp8-head", "keeps the head's weights in FP8", QuantizedHead),
    )


def list_plain(kind: str, *rows: tuple[str, str, str, type[Reference]]) -> Iterator[Variant]:
    """Those that need nothing of the model: part, name, text, override."""
    for part, name, text, override in rows:
        yield Variant(kind, part, name, text, (override,))


def list_lost_scales(model: Transformer, projections: Mapping[int, Projection]) -> Iterator[Variant]:
    """Scales of `wk` taken as 1: in all layers, or in one."""
    lost = {
        layer: p._replace(wk=p.wk._replace(scale=torch.ones_like(p.wk.scale)))
        for layer, p in projections.items()
        if p.wk.scale is not None and p.wk.scale.unique().numel() > 1  # the layer norm hides a common factor
    }
    if len(lost) > 1:
        text, override = "takes the FP8 scales of every wk as 1", lose_scales(model, lost)
        yield Variant("fault", "wk", "wk-scales", text, (override,))
    for layer, projection in lost.items():
        text = f"takes the FP8 scales of model.layers.{layer}.self_attn.indexer.wk as 1"
        yield Variant("fault", "wk", f"wk-scales-{layer}", text, (lose_scales(model, {layer: projection}),))
