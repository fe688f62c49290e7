"""The indexer tensors of a checkpoint as they are stored, and what their upcast to BF16 costs.

Reads a few MB with the loader's own reader; decodes with the one `dequantize`. Next: probe.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.checkpoint.coding import Coding, find_coding
from saccade.checkpoint.index import Index
from saccade.checkpoint.read import RowRange, read_rows
from saccade.config import ModelConfig
from saccade.eval.arrangements import Projection
from saccade.kernels.codes import read_scale
from saccade.kernels.matrix import Matrix
from saccade.kernels.reference import decode

BOUND = 2.0**-8  # the most that BF16's 8 significant bits can round a number by, relative


class Upcast(NamedTuple):
    """What becomes of one `wk` when it is held in BF16."""

    tensor: str
    stored: str
    least_scale: float | None  # None: plain numbers
    largest_scale: float | None
    column_blocks: int
    scales: int  # how many of them differ
    is_power_of_two: bool  # then the upcast is exact, bit for bit
    rounding: float  # measured, relative to the exact product


def read_projections(config: ModelConfig, index: Index, device: str) -> tuple[dict[int, Projection], list[Upcast]]:
    """The projection of each main layer that has an indexer; upcasts also of MTP layers that the checkpoint has."""
    projections, upcasts = {}, []
    for layer in range(config.num_hidden_layers + (config.num_nextn_predict_layers or 0)):
        x = f"model.layers.{layer}.self_attn.indexer."
        is_main = layer < config.num_hidden_layers
        if config.has_indexer(layer) if is_main else x + "wk.weight" in index.entries:
            wk, upcast = read_wk(index, x + "wk.weight")
            upcasts.append(upcast)
            if not is_main:
                continue
            weights_proj = read_tensor(index, x + "weights_proj.weight").float()
            scale, second = (None if t is None else t.to(device) for t in (wk.scale, wk.global_scale))
            wk = wk._replace(data=wk.data.to(device), scale=scale, global_scale=second)
            projections[layer] = Projection(wk, weights_proj.to(device))
    return projections, upcasts


def read_wk(index: Index, name: str) -> tuple[Matrix, Upcast]:
    coding = find_coding(name, index.entries)
    if not isinstance(coding, Coding):
        data, stored = read_tensor(index, name).float(), index.entries[name].dtype
        return Matrix(data), Upcast(name, stored, None, None, 0, 0, False, _rounding(data))
    encoding = coding.encoding
    scale = read_tensor(index, coding.scale).view(encoding.scale_shape(coding.shape))
    second = None if coding.global_scale is None else read_tensor(index, coding.global_scale).view(1, 1)
    wk = Matrix(read_tensor(index, coding.codes), scale, encoding.group, encoding.code, second, encoding.divides)
    exact, scale = decode(wk), read_scale(scale)
    mantissa, _ = torch.frexp(scale)
    upcast = Upcast(
        name,
        encoding.name,
        float(scale.min()),
        float(scale.max()),
        scale.shape[-1],
        len(scale.unique()),
        bool((mantissa == 0.5).all()),
        _rounding(exact),
    )
    return wk, upcast


def read_tensor(index: Index, name: str) -> Tensor:
    """One whole tensor, as it is stored."""
    pieces: list[tuple[int, Tensor]] = []

    def keep(_: str, rows: Tensor, first_row: int) -> None:
        pieces.append((first_row, rows.clone()))

    shape = index.entries[name].shape
    read_rows(index, [RowRange(name, 0, shape[0] if shape else 1)], keep, threads=1)
    return torch.cat([rows for _, rows in sorted(pieces, key=lambda piece: piece[0])])


def _rounding(exact: Tensor) -> float:
    error = (exact.bfloat16().float() - exact).abs()
    return float((error / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)).max())
