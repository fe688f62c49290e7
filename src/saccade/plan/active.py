"""Active parameters: how many numbers a token of a prompt is multiplied with, on one rank.

Matrices of the decoder layers count, and of routed experts those that a token chooses. Embedding and head do not: the
first is looked up, the second sees the last token of a prompt. Next: api/settings/step_sizes.py, how many tokens a step
has; bench/bytes.py, the operations of a prompt.
"""

from math import prod

from saccade.config.file import Config
from saccade.models.parameters import Kind, Param
from saccade.models.registry import find_family
from saccade.plan.types import Plan


def count_active(param: Param, config: Config) -> float:
    """Those of one parameter, on average over tokens; 0 for norms, biases and other vectors."""
    if len(param.shape) < 2:
        return 0.0
    share = find_family(config.model_type).expert_share(config) if param.kind is Kind.EXPERTS else 1.0
    return prod(param.shape) * share


def count_active_numbers(plan: Plan) -> int:
    """Those of all layers but the MTP layer: 6.2e9 on each of eight ranks of DeepSeek-V3.2. The same on each rank of a
    family that shares its layers evenly."""
    layers, mtp = "model.layers.", f"model.layers.{plan.config.num_hidden_layers}."
    names = (param for param in plan.params if param.name.startswith(layers) and not param.name.startswith(mtp))
    return round(sum(count_active(param, plan.config) for param in names))
