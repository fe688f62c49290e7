"""The indexer projections of a checkpoint, ready to be computed with, and what their upcast to BF16 costs.

Reads a few MB with the loader's own reader. What is said of each `wk` comes from inspect/upcasts.py. Next: probe.py.
"""

from saccade.checkpoint.index import Index
from saccade.config import ModelConfig
from saccade.errors import CheckpointError
from saccade.eval.arrangements import Projection
from saccade.inspect.findings import Upcast
from saccade.inspect.stored import read_tensor
from saccade.inspect.upcasts import judge_upcast, read_stored
from saccade.kernels.matrix import Matrix


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
            scale = None if wk.scale is None else wk.scale.to(device)
            projections[layer] = Projection(Matrix(wk.data.to(device), scale, wk.group), weights_proj.to(device))
    return projections, upcasts


def read_wk(index: Index, name: str) -> tuple[Matrix, Upcast]:
    """A `wk` as it is stored, and its upcast. CheckpointError if it is stored in a way that cannot be compared."""
    stored = read_stored(index, name)
    upcast = None if stored is None else judge_upcast(name, index.entries[name].dtype, stored)
    if stored is None or upcast is None:
        raise CheckpointError(
            f"{name}: expected finite numbers, plain or in FP8 with a scale per block, to compare with"
        )
    if stored.pair is None:
        return Matrix(stored.data.float()), upcast
    return Matrix(stored.data, stored.scale, stored.pair.group), upcast
