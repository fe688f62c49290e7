"""Rotary embedding: from positions to angles. YaRN stretches the slow ones.

Runs once a step; every layer and every indexer turns by the same angles (`rotate` in kernels/reference.py does the
turning). Knows no tensors but positions. Next: attention.py, indexer.py.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from saccade.kernels.types import Rotation
from saccade.models.dsa.config import ModelConfig


class RotaryEmbedding:
    """cos and sin of position * frequency, scaled by `config.rope_scale`, in fp32."""

    def __init__(self, config: ModelConfig, device: torch.device):
        self.frequencies = find_frequencies(config).to(device)  # f32 [rope / 2]
        self.scale, self._positions = config.rope_scale, config.max_position_embeddings

    def __call__(self, positions: Tensor) -> Rotation:
        angles = positions.float()[:, None] * self.frequencies  # [T, rope / 2]
        return Rotation(angles.cos() * self.scale, angles.sin() * self.scale)

    @cached_property
    def table(self) -> Tensor:
        """f32 [positions, 2, rope / 2]: of every position, 42 MB for 163,840. A kernel reads it, because a GPU's own
        fast cosine of thousands of radians is wrong in the third digit."""
        return torch.stack(self(torch.arange(self._positions, device=self.frequencies.device)), 1)


def find_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position, f32 [rope / 2], fastest first.

    YaRN (Peng et al. 2023, section 3.2): pairs that turn more than beta_fast times within the original context keep
    their frequency, those that turn less than beta_slow times are slowed down by `factor`, with a ramp between them.
    """
    rope, width = config.rope, config.qk_rope_head_dim
    plain = 1.0 / rope.theta ** (torch.arange(0, width, 2).float() / width)
    if not rope.is_yarn:
        return plain

    def find_pair(turns: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        return width * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = find_pair(rope.beta_fast), find_pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2) - low) / max(high - low, 0.001)  # 0.001: a step where both ends meet
    slowed = ramp.clamp(0, 1)
    return plain * (1 - slowed) + plain / rope.factor * slowed
