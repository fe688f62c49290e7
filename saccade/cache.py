"""The paged cache: one pool of latents and one of index keys a layer, addressed by the same pages.

A page is PAGE tokens. Page 0 is never given to a request: rows of padding tokens land there. Which request owns which
page is the scheduler's business, unknown here. Rollback costs nothing: rows past a request's length are never read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.config import ModelConfig
from saccade.kernels import PAGE

DTYPES = {"auto": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Cache:
    """Item i of each tuple is layer i's; the last is the MTP layer's, if there is one."""

    latent: tuple[Tensor, ...]  # [pages * PAGE, kv_lora_rank + rope]
    index_keys: tuple[Tensor | None, ...]  # [pages * PAGE, index_head_dim]; None where the layer shares a selection

    @classmethod
    def allocate(cls, config: ModelConfig, pages: int, dtype: str, device: torch.device | str, mtp: bool) -> "Cache":
        """Pools of `pages` pages, page 0 included, zeroed: a masked row is multiplied by 0, and 0 * NaN is NaN."""
        latent: list[Tensor] = []
        index_keys: list[Tensor | None] = []
        for latent_width, key_width in widths(config, mtp):
            latent.append(torch.zeros(pages * PAGE, latent_width, dtype=DTYPES[dtype], device=device))
            has_keys = key_width > 0
            keys = torch.zeros(pages * PAGE, key_width, dtype=DTYPES[dtype], device=device) if has_keys else None
            index_keys.append(keys)
        return cls(tuple(latent), tuple(index_keys))

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: str, mtp: bool) -> int:
        """Bytes of one page over all layers."""
        return sum(map(sum, widths(config, mtp))) * PAGE * DTYPES[dtype].itemsize


def widths(config: ModelConfig, mtp: bool) -> list[tuple[int, int]]:
    """(latent, index key) values a token, for each layer; no index keys where a layer shares a selection."""
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    layers = config.num_hidden_layers + mtp
    return [(latent, config.index_head_dim if config.has_indexer(i) else 0) for i in range(layers)]
