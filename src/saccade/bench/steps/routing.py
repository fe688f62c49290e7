"""Which experts a measured step reads: those that the router chooses, or others that are given.

Synthetic weights route as they happen to, and another engine's differently. Experts that are each as likely as any
other are the same number of bytes for both: 256 * (1 - (1 - 8 / 256)^tokens) of 256. Next: decode.py.
"""

from typing import Any

import torch
from torch import Tensor

from saccade.errors import RequestError
from saccade.kernels.types import Chosen, Routing
from saccade.models.dsa.config import ModelConfig

ROUTER, UNIFORM = "router", "uniform"


class UniformChoice:
    """Instead of `choose_experts`: a draw for each layer and number of tokens, the same in every step."""

    def __init__(self, layers: int, dtype: torch.dtype = torch.int32) -> None:
        """`layers`: sparse ones, which ask in turn. `dtype`: of ids, as the operations have them."""
        self._layers, self._dtype, self._asked = layers, dtype, 0
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        tokens, experts = logits.shape
        place = self._asked % self._layers, tokens
        self._asked += 1
        if place not in self._drawn:
            dice = torch.Generator().manual_seed(1000 * place[0] + tokens)
            order = torch.rand(tokens, experts, generator=dice).topk(routing.topk, 1).indices
            self._drawn[place] = order.to(logits.device, self._dtype)
        ids = self._drawn[place]
        # Of the logits, so that what made them is not left out.
        shares = logits.gather(1, ids.long()).sigmoid()
        return ids, shares / shares.sum(1, keepdim=True) * routing.scaling


def require_experts(name: str, has_drafts: bool) -> None:
    """RequestError for another way to choose experts, or one that steps with drafts do not have."""
    if name == UNIFORM and has_drafts:
        raise RequestError("experts: steps with drafts take the router's; leave out --experts or --speculate")
    if name not in (ROUTER, UNIFORM):
        raise RequestError(f"experts: expected {ROUTER} or {UNIFORM}, found {name!r}")


def spread_experts(ops: Any, config: ModelConfig) -> None:
    """Let these operations take any expert as likely as any other, in each sparse layer."""
    dtype = torch.int32 if ops.kernels == "fast" else torch.int64
    ops.choose_experts = UniformChoice(config.mlp_layer_types.count("sparse"), dtype).choose_experts


def count_spread_experts(config: ModelConfig, tokens: int) -> float:
    """Distinct experts of a layer, on average, for so many tokens."""
    layers = config.mlp_layer_types.count("sparse")
    choice, logits = UniformChoice(layers), torch.zeros(tokens, config.n_routed_experts)
    routing = Routing(logits[0], 1, 1, config.num_experts_per_tok, 1.0)
    return sum(len(choice.choose_experts(logits, routing)[0].unique()) for _ in range(layers)) / layers
