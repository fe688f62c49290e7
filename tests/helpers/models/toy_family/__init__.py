"""A second model family, as somebody outside the package would write it: a folder, and one call of `register`.

What it has that DeepSeek's and GLM's do not: an indexer whose key norm is an RMS norm, and a third projection of the
same input, a gate of its heads, fused into its matrix; layers with a state a request instead of cache rows; cache rows
of other widths; two residual streams, which every block reads as a mixture and writes back to by weights. Read
config.py, parameters.py, model.py, operations.py.
"""

from saccade.models.registry import Family
from toy_family.config import read_config
from toy_family.parameters import cache_rows, parameters

TOY = Family(
    name="Toy",
    model_types=("toy_dsa",),
    read_config=read_config,
    parameters=parameters,
    cache_rows=cache_rows,
    model="toy_family.model:ToyModel",
    reference="toy_family.operations:ToyReference",
    gpu=None,
)
