"""What a wrong indexer costs: test problems answered by the trained model with one thing broken.

Only for choosing how to train; the engine's own check is `saccade eval`. Each fault is one that loaders have had.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from saccade.checkpoint.write import quantize_blocks
from saccade.models.dsa.config import ModelConfig
from tools.train_tiny.evaluate import Score, evaluate
from tools.train_tiny.export import rescale
from tools.train_tiny.model import Weights

Case = tuple[str, dict[str, Tensor], ModelConfig]


def list_faults(w: Weights, c: ModelConfig) -> Iterator[Case]:
    """Name, weights, config. `w` as `prepare` gives them, in FP8's numbers."""
    right = rescale(c, w)
    wk = [f"model.layers.{i}.self_attn.indexer.wk.weight" for i in range(c.num_hidden_layers + 1)]
    yield "none", right, c
    yield "rope layout", right, replace(c, indexer_rope_interleave=not c.indexer_rope_interleave)
    scales = {name: quantize_blocks(right[name].float().cpu())[1][0].to(right[name].device) for name in wk}
    yield "wk scales lost", right | {n: divide(right[n], scales[n]) for n in wk}, c
    for block in range(4):
        only = {n: torch.ones_like(scales[n]) for n in wk}
        for n in wk:
            only[n][block] = scales[n][block]
        yield f"wk scale {block} lost", right | {n: divide(right[n], only[n]) for n in wk}, c
    for block in range(4):
        other = {n: torch.ones_like(scales[n]) for n in wk}
        for n in wk:
            other[n][block] = scales[n][block] / scales[n][(block + 1) % 4]
        yield f"wk scale {block} its neighbour's", right | {n: divide(right[n], other[n]) for n in wk}, c
    yield "wk random", right | {n: scramble(right[n]) for n in wk}, c
    for name in (wk[-1], f"model.layers.{c.num_hidden_layers}.hnorm.weight"):
        yield f"MTP {name.split('.')[-2]} random", right | {name: scramble(right[name])}, c


def divide(w: Tensor, scale: Tensor) -> Tensor:
    return w / scale.repeat_interleave(128)[: w.shape[1]].to(w.dtype)


def scramble(w: Tensor) -> Tensor:
    """Random numbers of the same size."""
    dice = torch.Generator().manual_seed(1)
    return (torch.randn(w.shape, generator=dice) * float(w.float().square().mean() ** 0.5)).to(w)


def compare(
    w: Weights, c: ModelConfig, length: int, problems: int, device: torch.device | str
) -> Iterator[tuple[str, list[Score]]]:
    for name, broken, changed in list_faults(w, c):
        yield name, list(evaluate(broken, changed, (length,), problems, True, device))
