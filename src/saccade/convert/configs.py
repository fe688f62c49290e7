"""What the JSON files beside the tensors say after a conversion: config.json and the quantiser's own.

Saccade believes none of it, other engines do: they build a module quantised or plain by these lists before they see a
tensor. Who reads which list, by their sources and threads of 2026:

  modules_to_not_convert  vLLM (the exact module name), SGLang (whole names between dots), transformers (a regular
                          expression at the start, or the end of the name) for quant_method "fp8"
  ignored_layers          vLLM and SGLang, and if it is there, they do not look at modules_to_not_convert
  ignore                  compressed-tensors, read by vLLM, SGLang and transformers; ModelOpt since 1.0, whose keys
                          lie flat in config.json and hf_quant_config.json
  exclude                 Quark
  exclude_modules         ModelOpt before, whose keys lie under "quantization"

TensorRT-LLM builds the indexer in floating point whatever the lists say, so a BF16 `wk` is all it needs. Pure
functions on parsed JSON; no file is touched here. Next: target.py.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from saccade.checkpoint.encoding import PLAIN
from saccade.convert.changes import Mode, OutputTensor
from saccade.convert.modules import COMPANIONS, by_number, module_of
from saccade.models.registry import PLAIN_ROOT
from saccade.plan.fold import fold
from saccade.plan.names import name_in_family

LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules")
GENERAL = "modules_to_not_convert"
# The list without which engines hear nothing, by quant_method.
NEEDED = {"compressed-tensors": "ignore", "quark": "exclude"} | dict.fromkeys(
    ("fp8", "mxfp8", "mxfp4", "w4afp8"), GENERAL
)
NESTED, FLAT = "exclude_modules", "ignore"  # ModelOpt's
QUANTIZATION_KEYS = (
    "quantization_config",
    "compression_config",
)  # of config.json; the second is compressed-tensors' old name
MODELOPT, ASCEND = "hf_quant_config.json", "quant_model_description.json"
# Files that describe a quantisation and nothing else; engines take a model for quantised if one is there.
QUANTISERS = frozenset({MODELOPT, ASCEND, "quant_config.json", "quantize_config.json", "quantization_config.json"})

PUBLISHED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# Powers of two, held in F32. GLM's scales are so too, but its configs do not say it.
SCALE_FORMAT = {"deepseek_v32": {"scale_fmt": "ue8m0"}}


class Plainness(NamedTuple):
    """Modules of the result that are not quantised, as lists name them."""

    new: tuple[str, ...]  # made plain by this conversion, and what engines fuse them with
    all: tuple[str, ...]  # every module with a plain matrix
    aliases: tuple[str, ...] = ()  # all of them, as lists name modules of a text model that is not alone


def find_plain(items: Collection[OutputTensor], mtp: str, root: str = PLAIN_ROOT) -> Plainness:
    """`mtp`: what names of the MTP layer begin with; `root`: those of the text model."""
    matrices = {
        module_of(i.name): i for i in items if i.name.endswith(".weight") and len(i.shape) == 2 and i.dtype in PLAIN
    }
    new: dict[str, None] = {}
    for module, item in sorted(matrices.items(), key=lambda pair: by_number(pair[0])):
        if item.op == "dequantize":
            new[module] = None
            # Fused with wk into one plain matrix. GLM's published lists call it indexers_proj, which names nothing.
            partner = module.removesuffix(".wk") + ".weights_proj"
            if module.endswith(".wk") and partner in matrices:
                new[partner] = None
    # SGLang builds the MTP layer's block as model.decoder and renames list entries only for layer 61 (sglang#30864).
    for module in list(new):
        if module.startswith(mtp):
            new["model.decoder." + module.removeprefix(mtp)] = None
    every = tuple(sorted(matrices, key=by_number))
    if root == PLAIN_ROOT:
        return Plainness(tuple(new), every)
    # The published list of GLM-5.3-Flash names its text model as if it were alone. Engines rename either form.
    new |= dict.fromkeys(name_in_family(module, root) for module in list(new))
    return Plainness(tuple(new), every, tuple(name_in_family(name, root) for name in every if name.startswith(root)))


def convert_config(
    values: Mapping[str, Any], mode: Mode, plain: Plainness, all_plain: bool
) -> tuple[dict[str, Any], list[str]]:
    """config.json of the result, equal to `values` where nothing is to be said; and warnings. `all_plain`: nothing
    quantised is left."""
    config: dict[str, Any] = deepcopy(dict(values))
    if mode.name == "upcast" and not all_plain:
        warnings = []
        for key in QUANTIZATION_KEYS:
            if config.get(key) is not None:
                default = "compressed-tensors" if key == "compression_config" else ""
                warnings += extend_block(config[key], plain, f"config.json: {key}", default)
        return config, warnings
    for key in QUANTIZATION_KEYS:
        config.pop(key, None)
    if mode.name == "fp8":
        kind = SCALE_FORMAT.get(str(config.get("model_type")), {})
        config["quantization_config"] = PUBLISHED | kind | {GENERAL: [*plain.all, *plain.aliases]}
    else:
        known = [key for key in ("dtype", "torch_dtype") if key in config]
        config |= dict.fromkeys(known or ["torch_dtype"], "bfloat16")
    return config, []


def extend_block(block: Any, plain: Plainness, where: str, default: str = "") -> list[str]:
    """Name the plain modules in a description of a quantisation, as its method wants it; a warning if it is of no
    known form. `default`: its quant_method if it does not say."""
    if not isinstance(block, dict):
        return [explain_unknown(where, plain)]
    method = str(block.get("quant_method") or default).lower()
    producer = block.get("producer")
    by_modelopt = method.startswith("modelopt") or (isinstance(producer, dict) and producer.get("name") == "modelopt")
    inner = next(
        (block[key] for key in ("quantization", "quantization_config") if isinstance(block.get(key), dict)), None
    )
    if isinstance(block.get("quantization"), dict):  # nobody but ModelOpt nests it so
        extend_lists(block["quantization"], plain, (NESTED,))
    elif inner is not None:
        return extend_block(inner, plain, where, method)
    elif by_modelopt or "quant_algo" in block:
        extend_lists(block, plain, (FLAT,), (NESTED,))
    elif method in NEEDED:
        extend_lists(block, plain, (NEEDED[method],))
    elif any(isinstance(block.get(key), list) for key in LISTS):
        extend_lists(block, plain, ())
    elif method:
        extend_lists(block, plain, (GENERAL,))
        return [
            f"{where}: quant_method {method} is not known here, so plain modules are listed as {GENERAL}; see that the "
            f"engine reads it, or tell it that these are plain: {show_new(plain)}"
        ]
    else:
        return [explain_unknown(where, plain)]
    return []


def extend_lists(
    block: dict[str, Any], plain: Plainness, needed: tuple[str, ...], customary: tuple[str, ...] = ()
) -> None:
    """Name the new plain modules in every list that is there. Start those that are `needed` and missing, and, if there
    is none at all, the `customary` ones.

    A new list names all plain modules: transformers leaves lm_head alone only as long as there is no list.
    """
    present = [key for key in LISTS if isinstance(block.get(key), list)]
    for key in present:
        known = {name for name in block[key] if isinstance(name, str)}
        block[key] += [name for name in plain.new if name not in known]
    aliases = [name for name in plain.new if name not in plain.all]
    for key in needed if present else (*needed, *customary):
        if key not in present:
            block[key] = [*plain.all, *aliases]
    layers = block.get("quantized_layers")  # ModelOpt's mixed precision: the opposite of an exclude list
    if isinstance(layers, dict):
        for name in plain.new:
            layers.pop(name, None)


def convert_quantiser(file: str, values: Any, plain: Plainness) -> tuple[Any, list[str]]:
    """A quantiser's own file after an upcast, and warnings; `values` unchanged if it is of no known form."""
    values = deepcopy(values)
    if file == ASCEND and isinstance(values, dict):
        listed = [module for module in plain.new if module + ".weight" in values]
        for module in listed:
            values[module + ".weight"] = "FLOAT"
            for leaf in COMPANIONS:
                values.pop(f"{module}.{leaf}", None)
        return values, [] if listed else [explain_unknown(file, plain)]
    default = "modelopt" if file == MODELOPT and isinstance(values, dict) and "quantization" not in values else ""
    return values, extend_block(values, plain, file, default)


def explain_unknown(where: str, plain: Plainness) -> str:
    return f"{where}: is of no known form and stays as it is; what reads it must be told that these are plain: " + (
        show_new(plain)
    )


def show_new(plain: Plainness) -> str:
    return ", ".join(fold(name for name in plain.new if name in plain.all))
