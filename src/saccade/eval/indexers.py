"""The indexer projections of a checkpoint, ready to be computed with, and what their upcast to BF16 costs.

Reads a few MB with the loader's own reader. inspect/upcasts.py says what each upcast costs. Next: probe.py.
"""

from saccade.checkpoint.index import Index
from saccade.errors import CheckpointError
from saccade.eval.arrangements import Projection
from saccade.inspect.findings import Upcast
from saccade.inspect.stored import Codings, read_tensor
from saccade.inspect.upcasts import judge_upcast
from saccade.kernels.types import Matrix
from saccade.models.dsa.config import ModelConfig


def read_projections(config: ModelConfig, index: Index, device: str) -> tuple[dict[int, Projection], list[Upcast]]:
    """The projection of each main layer that has an indexer; upcasts also of MTP layers that the checkpoint has."""
    projections, upcasts, codings = {}, [], Codings.of(config, index)
    for layer in range(config.num_hidden_layers + (config.num_nextn_predict_layers or 0)):
        x = f"model.layers.{layer}.self_attn.indexer."
        is_main = layer < config.num_hidden_layers
        if config.has_indexer(layer) if is_main else x + "wk.weight" in index.entries:
            wk, upcast = read_wk(codings, x + "wk.weight")
            upcasts.append(upcast)
            if not is_main:
                continue
            weights_proj = read_tensor(index, x + "weights_proj.weight").float()
            scale, second = (None if t is None else t.to(device) for t in (wk.scale, wk.global_scale))
            wk = wk._replace(data=wk.data.to(device), scale=scale, global_scale=second)
            projections[layer] = Projection(wk, weights_proj.to(device))
    return projections, upcasts


def read_wk(codings: Codings, name: str) -> tuple[Matrix, Upcast]:
    """A `wk` as it is stored, and its upcast. CheckpointError if it cannot be compared."""
    read = codings.read_matrix(name)
    if read is None:
        found = codings.name_of(codings.index.entries[name])
        raise CheckpointError(f"{name} is stored as {found}, which cannot be read")
    wk, stored = read
    upcast = judge_upcast(name, stored, wk)
    if upcast is None:
        raise CheckpointError(f"{name}: expected finite numbers, found others; see `saccade check --contents`")
    return wk, upcast


def move(w: Matrix, device: str) -> Matrix:
    scale, second = (None if part is None else part.to(device) for part in (w.scale, w.global_scale))
    return w._replace(data=w.data.to(device), scale=scale, global_scale=second)
