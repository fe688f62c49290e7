"""The published storage layouts, as tests/headers/*.txt tell them: which tensors a checkpoint has, and what they mean.

A file names matrices, then the tensors that each is stored as, then how their numbers combine; every other matrix is
BF16. `out` and `in` are the matrix's rows and columns, quotients are rounded up. In names, {a|b} stands for either,
{expert} for any number, and {dense}, {sparse}, {attending}, {mtp}, {layer} for layers of that sort. Imports nothing of
ours.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flash_headers import published_flash, small_flash_config
from header_checkpoints import Spec, published
from published_configs import deepseek_v32_config, glm5_config, glm52_config, glm53_flash_config
from small_checkpoints import small_config

HEADERS = Path(__file__).parents[2] / "headers"
SHARED = ["full", "shared", "full"]  # the small GLM-5.2's indexers
CONFIGS = {
    "deepseek": deepseek_v32_config, "glm5": glm5_config, "glm52": glm52_config, "flash": glm53_flash_config,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "glm5": {"model_type": "glm_moe_dsa"},
    "glm52": {"model_type": "glm_moe_dsa", "indexer_types": SHARED},
}


class Stored(NamedTuple):
    leaf: str  # weight, weight_scale, ...
    dtype: str
    dims: tuple[str, ...]  # "out", "in/16", "1"

    def shape(self, out: int, in_: int) -> tuple[int, ...]:
        sides = {"out": out, "in": in_}
        parts = [dim.partition("/") for dim in self.dims]
        return tuple(math.ceil(sides[a] / int(b or 1)) if a in sides else int(a) for a, _, b in parts)


class Rule(NamedTuple):
    patterns: tuple[str, ...]
    tensors: tuple[Stored, ...]
    value: str  # "e2m1 * weight_scale / weight_global_scale"; "" if the format is refused


class Layout(NamedTuple):
    name: str
    model: str
    rules: tuple[Rule, ...]
    is_refused: bool


def read_layouts() -> dict[str, Layout]:
    return {path.stem: parse(path.stem, path.read_text()) for path in sorted(HEADERS.glob("*.txt"))}


def parse(name: str, text: str) -> Layout:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    model, is_refused = lines[0].removeprefix("config "), False
    rules: list[Rule] = []
    patterns: list[str] = []
    tensors: list[Stored] = []
    for line in lines[1:]:
        words = line.split(None, 2)
        if words[0] in ("value", "refused"):
            is_refused |= words[0] == "refused"
            rules.append(Rule(tuple(patterns), tuple(tensors), line.partition("=")[2].strip()))
            patterns, tensors = [], []
        elif line[0] != " ":
            patterns.append(line.strip())
        else:
            dims = words[2].strip("[]").split(", ")
            tensors.append(Stored(words[0], words[1], tuple(d for d in dims if d)))
    return Layout(name, model, tuple(rules), is_refused)


def rule_finder(layout: Layout, c: dict[str, Any]) -> Iterator[tuple[re.Pattern[str], Rule]]:
    text = c.get("text_config", c)
    layers, dense = text["num_hidden_layers"], text["first_k_dense_replace"]
    attending = [i for i, kind in enumerate(text.get("layer_types", [])) if kind == "deepseek_sparse_attention"]
    sorts = {
        "dense": range(dense), "sparse": range(dense, layers), "mtp": [layers], "layer": range(layers + 1),
        "attending": attending,
    }  # fmt: skip

    def spell(match: re.Match[str]) -> str:
        words = match[1].split("|")
        if words == ["expert"]:
            return r"\d+"
        if words[0] in sorts:
            words = [str(i) for word in words for i in sorts[word]]
        return "(?:" + "|".join(words) + ")"

    for rule in layout.rules:
        for pattern in rule.patterns:
            yield re.compile(re.sub(r"\{([^}]*)\}", spell, pattern.replace(".", r"\."))), rule


def config_of(layout: Layout, small: bool) -> dict[str, Any]:
    if small:
        return small_flash_config() if layout.model == "flash" else small_config(**SMALL[layout.model])
    return CONFIGS[layout.model]()


def plain_tensors(layout: Layout, c: dict[str, Any]) -> Iterable[Spec]:
    if layout.model == "flash":
        return published_flash(c)
    return published(c, mtp_copies=layout.model == "deepseek")


def modules(layout: Layout, c: dict[str, Any]) -> Iterator[tuple[Spec, Rule | None]]:
    """Every plain tensor of the model, and the rule that says how it is stored, if there is one."""
    rules = list(rule_finder(layout, c))
    for name, dtype, shape in plain_tensors(layout, c):
        if name.endswith("scale_inv"):
            continue
        module = name.removesuffix(".weight")
        rule = next((r for p, r in rules if p.fullmatch(module)), None) if len(shape) == 2 else None
        yield (name, "BF16" if dtype == "F8_E4M3" else dtype, shape), rule


def specs(layout: Layout, c: dict[str, Any]) -> Iterator[Spec]:
    """Every tensor of the checkpoint, as its headers would say."""
    for (name, dtype, shape), rule in modules(layout, c):
        if rule is None:
            yield name, dtype, shape
        else:
            module = name.removesuffix("weight")
            for t in rule.tensors:
                yield module + t.leaf, t.dtype, t.shape(*shape)
