"""What the JSON files beside the tensors say after a conversion: config.json and the quantiser's own.

Saccade believes none of it, other engines do: they build a module quantised or plain by these lists before they see a
tensor. Who reads which list, by their sources and threads of 2026:

  modules_to_not_convert  vLLM (the exact module name), SGLang (whole names between dots), transformers (a regular
                          expression at the start, or the end of the name) for quant_method "fp8"
  ignored_layers          vLLM and SGLang, and if it is there, they do not look at modules_to_not_convert
  ignore                  compressed-tensors, read by vLLM, SGLang and transformers; newer ModelOpt exports
  exclude                 Quark
  exclude_modules         ModelOpt: TensorRT-LLM reads it in hf_quant_config.json, vLLM and SGLang in either file

TensorRT-LLM builds the indexer in floating point whatever the lists say, so a BF16 `wk` is all it needs. Pure
functions on parsed JSON; no file is touched here. Next: target.py.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from saccade.checkpoint.encoding import PLAIN
from saccade.convert.changes import COMPANIONS, Item, Mode, module_of

LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules")
DEFAULT_LIST = {"compressed-tensors": "ignore", "quark": "exclude", "modelopt": "exclude_modules"}
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


def find_plain(items: Collection[Item], layers: int) -> Plainness:
    """`layers`: of the main model; the next one is the MTP layer."""
    matrices = {
        module_of(i.name): i for i in items if i.name.endswith(".weight") and len(i.shape) == 2 and i.dtype in PLAIN
    }
    new: dict[str, None] = {}
    for module, item in matrices.items():
        if item.op == "dequantize":
            new[module] = None
            # Fused with wk into one plain matrix. GLM's published lists call it indexers_proj, which names nothing.
            partner = module.removesuffix(".wk") + ".weights_proj"
            if module.endswith(".wk") and partner in matrices:
                new[partner] = None
    # SGLang builds the MTP layer's block as model.decoder and renames list entries only for layer 61 (sglang#30864).
    mtp = f"model.layers.{layers}."
    for module in list(new):
        if module.startswith(mtp):
            new["model.decoder." + module.removeprefix(mtp)] = None
    return Plainness(tuple(new), tuple(sorted(matrices)))


def convert_config(values: Mapping[str, Any], mode: Mode, plain: Plainness) -> dict[str, Any]:
    """config.json of the result; equal to `values` where nothing is to be said."""
    config: dict[str, Any] = deepcopy(dict(values))
    quantization = config.get("quantization_config")
    if mode.name == "upcast":
        if isinstance(quantization, dict):
            extend_lists(quantization, plain)
        return config
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    if mode.name == "bf16":
        known = [key for key in ("dtype", "torch_dtype") if key in config]
        config |= dict.fromkeys(known or ["torch_dtype"], "bfloat16")
    else:
        kind = SCALE_FORMAT.get(str(config.get("model_type")), {})
        config["quantization_config"] = PUBLISHED | kind | {"modules_to_not_convert": list(plain.all)}
    return config


def extend_lists(quantization: dict[str, Any], plain: Plainness) -> None:
    """Name the plain modules in every list that is there; without one, start the list that the method reads.

    A new list names all plain modules: transformers leaves lm_head alone only as long as there is no list.
    """
    present = [key for key in LISTS if isinstance(quantization.get(key), list)]
    for key in present:
        known = {name for name in quantization[key] if isinstance(name, str)}
        quantization[key] += [name for name in plain.new if name not in known]
    if not present:
        aliases = [name for name in plain.new if name not in plain.all]
        key = DEFAULT_LIST.get(str(quantization.get("quant_method")), "modules_to_not_convert")
        quantization[key] = [*plain.all, *aliases]
    layers = quantization.get("quantized_layers")  # ModelOpt's mixed precision: the opposite of an exclude list
    if isinstance(layers, dict):
        for name in plain.new:
            layers.pop(name, None)


def convert_quantiser(file: str, values: Any, plain: Plainness) -> Any:
    """ModelOpt's or Ascend's own file after an upcast; `values` unchanged if it is not of the known form."""
    values = deepcopy(values)
    if not isinstance(values, dict):
        return values
    if file == MODELOPT and isinstance(values.get("quantization"), dict):
        extend_lists(values["quantization"], plain)
    if file == ASCEND:
        for module in plain.new:
            if module + ".weight" in values:
                values[module + ".weight"] = "FLOAT"
                for leaf in COMPANIONS:
                    values.pop(f"{module}.{leaf}", None)
    return values
