"""Steps on a GPU: the same layers as model/ in fused kernels, eleven each for few tokens, instead of sixty operations.

Up to MOST tokens run here, whatever mixture of requests they are; layers of longer steps are in fast_many.py. Takes the
weights from the model's own objects, so that there is one copy and one place that names them. The model is the
specification: a test compares the two. Knows no requests. Next: graphs.py captures whole steps.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade import fast_many
from saccade.fast_step import Step, find_routing, select_everything, take_norm
from saccade.kernels import gpu
from saccade.kernels.attention.sparse_decode import SLICES, attend_values
from saccade.kernels.moe.down import contract, contract_into
from saccade.kernels.embed import begin_step
from saccade.kernels.moe.gate_up import expand
from saccade.kernels.linear.few import project
from saccade.kernels.moe.router import choose
from saccade.kernels.attention.queries import project_queries
from saccade.kernels.reference import Selection
from saccade.kernels.linear.gemv import multiply_into
from saccade.kernels.indexer.select import absorb, select_and_absorb
from saccade.kernels.linear.split_k import skinny, skinny_and_input
from saccade.kernels.residual import Norm, Residual, Stream, plain
from saccade.kernels.linear.row_tiles import Part
from saccade.model.attention import Attention
from saccade.model.decoder import DecoderLayer
from saccade.model.indexer import Indexer
from saccade.model.layers import Mlp
from saccade.model.moe import MixtureOfExperts
from saccade.model.transformer import Transformer

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache

MOST = 16  # tokens of a step; above, tiles of tokens pay

# (layer, x before its norm [T, hidden]) -> low-rank queries with latents and rotary keys [T, q_lora + kv_lora + rope],
# index keys before their norm [T, dim], head weights [T, heads]; all f32, rows may be strided.
ProjectInputs = Callable[[DecoderLayer, Residual], tuple[Tensor, Tensor, Tensor]]


def project_packed(layer: DecoderLayer, x: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """One launch over the FP8 rows of `qkv_a_proj` and the BF16 rows of `wk_weights_proj`."""
    a = layer.attention
    assert a.indexer is not None
    both = project(x, [a.qkv_a_proj, a.indexer.wk_weights_proj], take_norm(layer.input_norm))
    low, key, weights = both.split([a.q_lora + a.kv_lora + a.rope, a.indexer.dim, a.indexer.heads], dim=1)
    return low, key, weights


class FastModel:
    """What the engine asks of a model, by `model`: what no kernel takes runs as `model` says. Only `find_logits` wants
    weights that are covered, and up to MOST tokens."""

    def __init__(self, model: Transformer, project_inputs: ProjectInputs = project_packed):
        """`model` runs on the operations of kernels/gpu.py. `project_inputs` is asked in steps of up to MOST tokens."""
        self.model, self.config, self.mtp = model, model.config, model.mtp
        self.layers = model.layers
        self._project_inputs = project_inputs
        device = model.embed_tokens.device
        places = torch.arange(self.config.max_position_embeddings, device=device)
        self.turns = torch.stack(model.rotary(places), 1)  # f32 [positions, 2, rope / 2]: 42 MB for 163,840
        self._is_covered = all(is_covered(layer) for layer in model.layers)

    def forward(self, batch: "Batch", cache: "Cache", capture: list[Selection] | None = None) -> Tensor:
        """f32 [T, hidden], after the final norm; see Transformer.forward."""
        if not self._is_covered:
            return self.model.forward(batch, cache, capture)
        return self.model.norm(plain(self.run(batch, cache, capture)))

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows [L, hidden] of what `forward` returned."""
        if len(rows) > MOST or not self._is_covered:
            return self.model.logits(rows)
        return project(rows, [self.model.lm_head])

    def find_logits(self, batch: "Batch", cache: "Cache") -> Tensor:
        """f32 [T, vocab] of every token of a step: `forward` and `logits`, the norm in between in the head's launch."""
        return project(self.run(batch, cache), [self.model.lm_head], take_norm(self.model.norm))

    def run(self, batch: "Batch", cache: "Cache", capture: list[Selection] | None = None) -> Residual:
        """What the final norm takes, f32 [T, hidden], of any number of tokens."""
        norms = [take_norm(layer.input_norm) for layer in self.layers] + [take_norm(self.model.norm)]
        x, rotation = begin_step(batch.tokens, batch.positions, self.model.embed_tokens, self.turns, norms[0])
        step = Step(batch, cache, rotation, select_everything(batch, self.config.index_topk))
        selected: Selection | None = None
        for i, layer in enumerate(self.layers):
            given = None if self.config.has_indexer(i) else selected
            x, selected = self.run_layer(layer, x, step, given, norms[i + 1])
            if capture is not None:
                capture.append(selected)
        return x

    def run_layer(
        self, layer: DecoderLayer, x: Residual, step: Step, given: Selection | None, following: Norm
    ) -> tuple[Residual, Selection]:
        """One block, prepared for the norm that follows, and the selection it used: `given`, or its indexer's."""
        if isinstance(x, Tensor) and len(x) > MOST:
            return fast_many.run_layer(layer, x, step, given)
        x, selected = self._attend(layer, x, step, given)
        return self._think(layer, x, following), selected

    def _attend(
        self, layer: DecoderLayer, x: Residual, step: Step, given: Selection | None
    ) -> tuple[Residual, Selection]:
        """x + attention(norm(x)), and the selection: the one that is given, or the indexer's."""
        a = layer.attention
        if given is None:
            assert a.indexer is not None, "a layer that shares a selection was given none"
            selected, absorbed = self._look(a, a.indexer, self._project_inputs(layer, x), step)
        else:
            low = project(x, [a.qkv_a_proj], take_norm(layer.input_norm))
            q = project_queries(low, take_norm(a.q_a_norm), [a.q_b_proj], step.entry(a))
            selected = given
            absorbed = absorb(q.unflatten(1, (-1, a.nope + a.rope)), a.w_uk, step.rotation)
        where = (step.batch.page_table, step.batch.request, selected)
        slices = SLICES if isinstance(x, Stream) else 1
        out = attend_values(absorbed, step.cache.latent[a.layer], *where, a.scale, a.w_uv, slices=slices)
        if isinstance(x, Stream):
            return multiply_into(out, a.o_proj, x.x, take_norm(layer.post_attention_norm)), selected
        return project(out, [a.o_proj], residual=x), selected

    def _look(
        self, a: Attention, indexer: Indexer, inputs: tuple[Tensor, Tensor, Tensor], step: Step
    ) -> tuple[Selection, Tensor]:
        """Write the tokens' rows into the cache; what they may see, and their queries as they meet the latents."""
        low, key, weights = inputs
        parts: list[Part] = [a.q_b_proj] if step.everything is not None else [a.q_b_proj, indexer.wq_b]
        projected = project_queries(low, take_norm(a.q_a_norm), parts, step.entry(a, key))
        width = len(a.w_uk) * (a.nope + a.rope)
        q = projected[:, :width].unflatten(1, (-1, a.nope + a.rope))
        if step.everything is not None:
            return step.everything, absorb(q, a.w_uk, step.rotation)
        logits = step.score(a, indexer, projected[:, width:], weights)
        return select_and_absorb(logits, step.batch.positions, indexer.topk, q, a.w_uk, step.rotation)

    def _think(self, layer: DecoderLayer, x: Residual, following: Norm) -> Residual:
        """x + mlp(norm(x)), or the mixture of experts; prepared for the norm that follows."""
        norm, mlp = take_norm(layer.post_attention_norm), layer.mlp
        if isinstance(mlp, Mlp):
            if isinstance(x, Tensor):
                return skinny(skinny(x, [mlp.gate_up_proj], norm), [mlp.down_proj], residual=x, gated=True)
            return contract_into(x.x, expand(x, norm, mlp.gate_up_proj), mlp.down_proj, None, None, following)
        shared, routing = mlp.shared_experts, find_routing(mlp)
        if isinstance(x, Stream) and has_kernel(mlp):
            chosen = choose(project(x, [mlp.gate], norm), routing)
            hidden = expand(x, norm, shared.gate_up_proj, chosen[0], mlp.gate_up_proj)
            return contract_into(x.x, hidden, shared.down_proj, chosen, mlp.down_proj, following)
        logits, h = skinny_and_input(plain(x), [mlp.gate], norm)
        chosen = choose(logits, routing)
        if has_kernel(mlp):
            hidden = expand(h, None, shared.gate_up_proj, chosen[0], mlp.gate_up_proj)
            return contract(plain(x), hidden, shared.down_proj, chosen, mlp.down_proj)
        routed = gpu.expert_mlp(h, chosen[0].long(), chosen[1], mlp.gate_up_proj, mlp.down_proj)
        return contract(plain(x), expand(h, None, shared.gate_up_proj), shared.down_proj) + routed


def has_kernel(mlp: MixtureOfExperts) -> bool:
    """Whether the experts are numbers, or FP8 by blocks; other codes have kernels of their own in packed.py."""
    return all(w.scale is None or (w.code, w.group) == ("e4m3", (128, 128)) for w in (mlp.gate_up_proj, mlp.down_proj))


def is_covered(layer: DecoderLayer) -> bool:
    """Whether the weights have the dtypes of `auto`: with those of `float32`, the yardstick, nothing is gained."""
    return layer.attention.w_uk.dtype == torch.bfloat16
