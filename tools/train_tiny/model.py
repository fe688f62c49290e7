"""The model, differentiable: what saccade/models/dsa computes, over whole rows instead of a paged cache.

Attention is not absorbed here, the selection is a mask on dense attention, and every expert sees every token with a
weight that is mostly zero: slower per token at inference, simplest and fastest to train at this size. Weights come as a
dictionary by their published names, experts stacked (weights.py), in the dtype to compute in. A test proves that the
logits, MTP layer included, are the engine's. Next: train.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.dsa.config import ModelConfig

Weights = Mapping[str, Tensor]
EPS = 1e-6  # of the norm inside the indexer
SCORES_IN_MEMORY = 1 << 29  # numbers: scores of all heads at once while selecting, 1 GB in bf16


class Angles(NamedTuple):
    cos: Tensor  # f32 [L, rope / 2]
    sin: Tensor


class Report(NamedTuple):
    """What a block did beside its output."""

    kl: Tensor  # of the main attention from the indexer's softmax, mean over the sampled rows
    mass: Tensor  # share of the attention that the indexer's best index_topk positions have, mean over those rows
    load: Tensor | None  # [experts] tokens that chose each; None in a dense layer


class Sampled(NamedTuple):
    """The query rows at which the indexer is trained: all would cost as much as the model itself."""

    rows: Tensor  # i64 [B, R]
    weight: Tensor  # f32 [B, R], sums to 1 over the batch


def find_angles(config: ModelConfig, length: int, device: torch.device) -> Angles:
    width = config.qk_rope_head_dim
    frequency = 1.0 / config.rope.theta ** (torch.arange(0, width, 2, device=device).float() / width)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    return Angles(angle.cos(), angle.sin())


def rotate(x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """Turn x [B, L, heads, rope], row i of L by the angles of position i."""
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


# The lightning indexer.


def index_keys(w: Weights, p: str, c: ModelConfig, x: Tensor, angles: Angles) -> Tensor:
    """[B, L, dim]."""
    k = F.linear(x, w[p + "wk.weight"]).float()
    k = F.layer_norm(k, k.shape[-1:], w[p + "k_norm.weight"].float(), w[p + "k_norm.bias"].float(), EPS)
    turned = rotate(k[..., None, : c.qk_rope_head_dim], angles, c.indexer_rope_interleave)[..., 0, :]
    return torch.cat([turned, k[..., c.qk_rope_head_dim :]], -1).to(x.dtype)


def index_queries(
    w: Weights, p: str, c: ModelConfig, x: Tensor, q_latent: Tensor, rows: Tensor | None, angles: Angles
) -> tuple[Tensor, Tensor]:
    """Queries [B, R, heads, dim] and f32 head weights [B, R, heads], of the given rows or of all."""
    if rows is not None:
        x, q_latent = pick_rows(x, rows), pick_rows(q_latent, rows)
    q = F.linear(q_latent, w[p + "wq_b.weight"]).unflatten(2, (c.index_n_heads, c.index_head_dim))
    turned, rest = q.split([c.qk_rope_head_dim, c.index_head_dim - c.qk_rope_head_dim], -1)
    if rows is None:
        turned = rotate(turned, angles, c.indexer_rope_interleave)
    else:  # each row has its own angles: fold rows and batch into one axis
        own = Angles(angles.cos[rows.flatten()], angles.sin[rows.flatten()])
        turned = rotate(turned.flatten(0, 1)[None], own, c.indexer_rope_interleave)[0].view_as(turned)
    weights = F.linear(x, w[p + "weights_proj.weight"]).float() * (c.index_n_heads**-0.5 * c.index_head_dim**-0.5)
    return torch.cat([turned, rest], -1), weights


def index_scores(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
    """[B, R, L]: sum over heads of relu(q . k) * weight, in the dtype of `weights`."""
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).relu().unflatten(1, q.shape[1:3])  # [B, R, heads, L]
    return (weights[:, :, None] @ scores.to(weights.dtype)).squeeze(2)


@torch.no_grad()
def select(q: Tensor, weights: Tensor, k: Tensor, topk: int) -> Tensor:
    """[B, L, L] in the dtype of q: 0 where a query may look, -inf elsewhere; at most `topk` zeros a row, none behind
    the query."""
    length = k.shape[1]
    bias = torch.full((*q.shape[:2], length), float("-inf"), dtype=q.dtype, device=q.device)
    behind = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    rows = max(1, SCORES_IN_MEMORY // (length * length * q.shape[2]))
    for some_q, some_weights, some_k, out in zip(*(t.split(rows) for t in (q, weights, k, bias)), strict=True):
        scores = index_scores(some_q, some_weights.to(q.dtype), some_k).masked_fill_(behind, float("-inf"))
        best = scores.topk(min(topk, length), dim=2)
        out.scatter_(2, best.indices, torch.where(best.values == float("-inf"), best.values, 0))
    return bias


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, L, ...] -> [B, R, ...]."""
    return x.gather(1, rows.view(*rows.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


@torch.no_grad()
def find_target(q: Tensor, k: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """f32 [B, R, L]: the attention of the sampled rows, summed over heads and normalised, 0 where `hidden` [B, R, L].

    q: [B, heads, R, D] at these rows; k: [B, heads, L, D].
    """
    return ((q @ k.transpose(2, 3)).float() * scale).masked_fill_(hidden[:, None], float("-inf")).softmax(-1).mean(1)


def imitate(scores: Tensor, target: Tensor, hidden: Tensor, weight: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The indexer's loss: KL(attention || softmax of the index scores), over what the attention could see
    (DeepSeek-V3.2 report, equations 3 and 4); and the attention's mass on the indexer's best positions."""
    masked = scores.masked_fill(hidden, float("-inf"))
    guess = masked.log_softmax(-1).masked_fill(hidden, 0.0)
    kl = (torch.xlogy(target, target) - target * guess).sum(-1)
    with torch.no_grad():
        best = masked.topk(min(topk, masked.shape[-1]), dim=-1).indices
        mass = target.gather(2, best).sum(-1)
    return (kl * weight).sum(), (mass * weight).sum()


# The blocks.


def attend(
    w: Weights, p: str, c: ModelConfig, x: Tensor, angles: Angles, sparse: bool, sampled: Sampled | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of x [B, L, hidden], and what the indexer has to learn: kl and mass of a Report."""
    heads, nope, rope, v_dim = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    q_latent = rms_norm(F.linear(x, w[p + "q_a_proj.weight"]), w[p + "q_a_layernorm.weight"], c.latent_norm_eps)
    latent, k_rope = F.linear(x, w[p + "kv_a_proj_with_mqa.weight"]).split([c.kv_lora_rank, rope], -1)
    latent = rms_norm(latent, w[p + "kv_a_layernorm.weight"], c.latent_norm_eps)
    q_nope, q_rope = F.linear(q_latent, w[p + "q_b_proj.weight"]).unflatten(2, (heads, -1)).split([nope, rope], -1)
    q = torch.cat([q_nope, rotate(q_rope, angles, True)], -1).transpose(1, 2)  # [B, heads, L, nope + rope]
    k_nope, v = F.linear(latent, w[p + "kv_b_proj.weight"]).unflatten(2, (heads, -1)).split([nope, v_dim], -1)
    k_rope = rotate(k_rope[:, :, None], angles, True).expand(-1, -1, heads, -1)
    k = torch.cat([k_nope, k_rope], -1).transpose(1, 2)

    bias, x, q_latent = None, x.detach(), q_latent.detach()
    index_k = index_keys(w, p + "indexer.", c, x, angles)
    if sparse and x.shape[1] > c.index_topk:
        with torch.no_grad():
            bias = select(*index_queries(w, p + "indexer.", c, x, q_latent, None, angles), index_k, c.index_topk)
    out = F.scaled_dot_product_attention(
        q, k, v.transpose(1, 2), None if bias is None else bias[:, None], is_causal=bias is None, scale=c.softmax_scale
    )
    losses = learn_selection(w, p, c, x, q_latent, index_k, q, k, angles, bias, sampled)
    return F.linear(out.transpose(1, 2).flatten(2), w[p + "o_proj.weight"]), losses


def learn_selection(
    w: Weights, p: str, c: ModelConfig, x: Tensor, q_latent: Tensor, index_k: Tensor, q: Tensor, k: Tensor,
    angles: Angles, bias: Tensor | None, sampled: Sampled | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl and mass of a Report; zeros if no rows are sampled."""
    zero = x.new_zeros((), dtype=torch.float32)
    if sampled is None:
        return zero, zero
    if bias is None:
        hidden = torch.arange(k.shape[2], device=k.device) > sampled.rows[..., None]
    else:
        hidden = pick_rows(bias, sampled.rows) != 0
    q_rows = pick_rows(q.detach().transpose(1, 2), sampled.rows).transpose(1, 2)
    target = find_target(q_rows, k.detach(), c.softmax_scale, hidden)
    index_q, weights = index_queries(w, p + "indexer.", c, x, q_latent, sampled.rows, angles)
    return imitate(index_scores(index_q, weights, index_k), target, hidden, sampled.weight, c.index_topk)


def mlp(w: Weights, p: str, x: Tensor) -> Tensor:
    gated = F.silu(F.linear(x, w[p + "gate_proj.weight"])) * F.linear(x, w[p + "up_proj.weight"])
    return F.linear(gated, w[p + "down_proj.weight"])


def route(w: Weights, p: str, c: ModelConfig, x: Tensor) -> Tensor:
    """f32 [..., experts]: the weight of each expert, 0 for those not chosen."""
    scores = F.linear(x.float(), w[p + "gate.weight"].float()).sigmoid()
    with torch.no_grad():
        choice = (scores + w[p + "gate.e_score_correction_bias"]).unflatten(-1, (c.n_group, -1))
        worth = choice.topk(min(2, choice.shape[-1]), dim=-1).values.sum(-1)
        closed = torch.ones_like(worth, dtype=torch.bool).scatter(-1, worth.topk(c.topk_group, dim=-1).indices, False)
        chosen = choice.masked_fill(closed[..., None], float("-inf")).flatten(-2).topk(c.num_experts_per_tok).indices
        taken = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    scores = scores * taken
    return scores / (scores.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor


def mix_experts(w: Weights, p: str, c: ModelConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture of experts, and how many tokens chose each."""
    weights = route(w, p, c, x)
    gate_up, down = w[p + "experts.gate_up_proj"], w[p + "experts.down_proj"]  # [E, 2n, hidden], [E, hidden, n]
    gate, up = F.linear(x, gate_up.flatten(0, 1)).unflatten(-1, (c.n_routed_experts, 2, -1)).unbind(-2)
    gated = F.silu(gate) * up * weights[..., None].to(x.dtype)  # [B, L, E, n]
    routed = F.linear(gated.flatten(-2), down.transpose(0, 1).flatten(1))
    return routed + mlp(w, p + "shared_experts.", x), (weights > 0).flatten(0, -2).sum(0)


def block(
    w: Weights, layer: int, c: ModelConfig, x: Tensor, angles: Angles, sparse: bool, sampled: Sampled | None
) -> tuple[Tensor, Report]:
    p = f"model.layers.{layer}."
    seen, learned = attend(
        w, p + "self_attn.", c, rms_norm(x, w[p + "input_layernorm.weight"], c.rms_norm_eps), angles, sparse, sampled
    )
    x = x + seen
    normed = rms_norm(x, w[p + "post_attention_layernorm.weight"], c.rms_norm_eps)
    if c.is_sparse(layer):
        out, load = mix_experts(w, p + "mlp.", c, normed)
        return x + out, Report(*learned, load)
    return x + mlp(w, p + "mlp.", normed), Report(*learned, None)


def run_main(
    w: Weights, c: ModelConfig, tokens: Tensor, sparse: bool, sampled: Sampled | None = None
) -> tuple[Tensor, list[Report]]:
    """Tokens [B, L] -> the hidden state after the final norm [B, L, hidden], and a report a layer."""
    x = F.embedding(tokens, w["model.embed_tokens.weight"])
    angles = find_angles(c, tokens.shape[1], tokens.device)
    reports = []
    for layer in range(c.num_hidden_layers):
        x, report = block(w, layer, c, x, angles, sparse, sampled)
        reports.append(report)
    return rms_norm(x, w["model.norm.weight"], c.rms_norm_eps), reports


def run_mtp(
    w: Weights, c: ModelConfig, next_tokens: Tensor, hidden: Tensor, sparse: bool, sampled: Sampled | None = None
) -> tuple[Tensor, Report]:
    """At place i: token i + 1 and the state at i -> the state that predicts token i + 2, normed once."""
    p = f"model.layers.{c.num_hidden_layers}."
    embedded = rms_norm(F.embedding(next_tokens, w["model.embed_tokens.weight"]), w[p + "enorm.weight"], c.rms_norm_eps)
    state = rms_norm(hidden, w[p + "hnorm.weight"], c.rms_norm_eps)
    x = F.linear(torch.cat([embedded, state], -1), w[p + "eh_proj.weight"])
    x, report = block(w, c.num_hidden_layers, c, x, find_angles(c, x.shape[1], x.device), sparse, sampled)
    return rms_norm(x, w[p + "shared_head.norm.weight"], c.rms_norm_eps), report


def head(w: Weights, hidden: Tensor) -> Tensor:
    """f32 logits [..., vocab]."""
    return F.linear(hidden, w["lm_head.weight"]).float()
