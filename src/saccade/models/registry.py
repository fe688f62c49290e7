"""Which family a model_type belongs to, and what the rest of the package may ask of a family.

A family is a folder: how its config.json is read, which parameters it has, what it leaves in caches and states, and its
forward pass, which is imported when it is first built, because it needs torch. Nothing here does. Next:
dsa/config.py, dsa/parameters.py, dsa/cache_rows.py, dsa/transformer.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from saccade.config.file import Config, find_model_type, parse_config
from saccade.errors import ConfigError
from saccade.models.cache_rows import LayerCache
from saccade.models.dsa.cache_rows import cache_rows
from saccade.models.dsa.config import MODEL_TYPES, ModelConfig, find_expert_share
from saccade.models.dsa.parameters import find_unused, parameters
from saccade.models.glm5_next.cache_rows import cache_rows as flash_cache_rows
from saccade.models.glm5_next.config import MODEL_TYPES as FLASH_TYPES
from saccade.models.glm5_next.config import find_gpu_obstacle, read_flash_config
from saccade.models.glm5_next.parameters import OTHER_MODELS, ROOTS, stays_plain
from saccade.models.glm5_next.parameters import find_unused as find_flash_unused
from saccade.models.glm5_next.parameters import parameters as flash_parameters
from saccade.models.parameters import Extras, Layout, Param

PLAIN_ROOT = "model."  # where a text model lies that is alone in its files


@dataclass(frozen=True)
class Family:
    """What a family declares. `config` stands for what its own `read_config` returns. A place is "module:name"."""

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], str, tuple[str, ...]], Config]  # (values, the file for errors, notes)
    parameters: Callable[[Any, Layout, Extras], Iterable[Param]]  # (config, layout, extras), in order of use
    cache_rows: Callable[[Any, bool, Layout], list[LayerCache]]  # (config, mtp, layout), a layer each
    model: str  # place of the forward pass: (config, weights, ops), see engine/model.py
    # Of prefixes of tensors that some publish and no layer reads: the reason.
    find_unused: Callable[[Any], Mapping[str, str]] = lambda config: {}
    # Beginnings of names in files, where `parameters` and `find_unused` say "model."; the first that a checkpoint has.
    roots: tuple[str, ...] = (PLAIN_ROOT,)
    beside: Mapping[str, str] = field(default_factory=dict)  # other models in the same files: prefixes, and why unread
    stays_plain: Callable[[Any, str], bool] = lambda config, module: False  # in the published FP8 layout
    expert_share: Callable[[Any], float] = lambda config: 1.0  # of routed experts, those that a token chooses
    takes_back: bool = False  # whether states can do without the tokens of drafts that were refused
    reference: str = "saccade.ops.reference:Reference"  # place of its operations in plain torch
    gpu: str | None = "saccade.ops.gpu:Gpu"  # and in kernels; None: there are none
    find_gpu_obstacle: Callable[[Any], str] = lambda config: ""  # why they do not take a model of this config, or ""


DSA = Family(
    name="DeepSeek Sparse Attention",
    model_types=MODEL_TYPES,
    read_config=ModelConfig.from_dict,
    parameters=parameters,
    cache_rows=cache_rows,
    model="saccade.models.dsa.transformer:Transformer",
    find_unused=find_unused,
    expert_share=find_expert_share,
)

FLASH = Family(
    name="GLM-5.3-Flash",
    model_types=FLASH_TYPES,
    read_config=read_flash_config,
    parameters=flash_parameters,
    cache_rows=flash_cache_rows,
    model="saccade.models.glm5_next.transformer:FlashModel",
    find_unused=find_flash_unused,
    roots=ROOTS,
    beside=OTHER_MODELS,
    stays_plain=stays_plain,
    expert_share=find_expert_share,
    takes_back=True,
    reference="saccade.models.glm5_next.operations:FlashReference",
    gpu="saccade.models.glm5_next.gpu:FlashGpu",
    find_gpu_obstacle=find_gpu_obstacle,
)

FAMILIES = (DSA, FLASH)  # those of this package; others come by `register`
_families = {model_type: family for family in FAMILIES for model_type in family.model_types}


def find_family(model_type: str) -> Family:
    """ConfigError for one that no family has."""
    if model_type not in _families:
        raise ConfigError(f"model_type {model_type!r} belongs to no family; known: {', '.join(_families)}")
    return _families[model_type]


def register(family: Family) -> Callable[[], None]:
    """Add a family from outside this package; the function that is returned takes it away again. ValueError for a
    model_type that is taken."""
    taken = [model_type for model_type in family.model_types if model_type in _families]
    if taken:
        raise ValueError(f"model_type {taken[0]!r} belongs to {_families[taken[0]].name}")
    _families.update((model_type, family) for model_type in family.model_types)

    def withdraw() -> None:
        for model_type in family.model_types:
            del _families[model_type]

    return withdraw


def make_config(raw: bytes, source: str = "config.json") -> Config:
    """The config in the bytes of a config.json, by the reader of its family; `source` names the file in errors.
    ConfigError for anything wrong with it, a model_type of no family included."""
    values, notes = parse_config(raw, source)
    model_type = find_model_type(values, source, _families)
    return _families[model_type].read_config(values, source, notes)


def find_cache_rows(config: Config, mtp: bool, at: Layout = Layout()) -> list[LayerCache]:
    """What a layer of the model keeps on one rank, for each layer; the MTP layer's last, if it is loaded."""
    return find_family(config.model_type).cache_rows(config, mtp, at)


def fetch_place(place: str) -> Any:
    """What stands at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
