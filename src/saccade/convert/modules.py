"""Which modules a user names, what they may have meant, and which modules engines build as one.

Names only; knows no tensor, no file and no config. Next: changes.py, which asks what is matched.
"""

import re
import shlex
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from saccade.base.near import find_near as find_closest
from saccade.checkpoint.encoding import STORED_LEAVES
from saccade.checkpoint.leftovers import BESIDE
from saccade.plan.fold import fold

# What may stand beside codes and means nothing without them.
COMPANIONS = STORED_LEAVES | BESIDE

# Modules side by side that engines build as one, quantised or plain as a whole: vLLM and SGLang end with "Detected some
# but not all shards of ... are quantized" if only one of them is listed as plain.
FUSED = (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("wk", "weights_proj"))
# All routed experts of a layer, with their three projections, are one module too.
EXPERTS = re.compile(r"(.*\bexperts)\.\d+\.")


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def by_number(name: str) -> list[str | int]:
    """A key to sort by: layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d{1,18})", name))]


def trim(pattern: str) -> str:
    """A module's name from that of one of its tensors: indexer.wk of indexer.wk.weight."""
    module, _, leaf = pattern.rpartition(".")
    return module if module and (leaf == "weight" or leaf in COMPANIONS) else pattern


def is_matched(module: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern (with * and ?) names the module, by its whole name or the end of it, or one that it lies in:
    indexer.wk, indexer and indexer.wk.weight all name layers.1.self_attn.indexer.wk, but not indexer.wk2."""
    return any(fnmatchcase(f".{module}.", f"*.{trim(pattern)}.*") for pattern in patterns)


def find_near_modules(pattern: str, modules: Iterable[str]) -> list[str]:
    """Names, or ends of names, that a pattern without a match may have meant."""
    wanted = [part for part in trim(pattern).split(".") if not part.isdigit()][-2:]
    known, parent = set[str](), module_of(trim(pattern))
    modules = list(modules)
    for module in modules:
        parts = [part for part in module.split(".") if not part.isdigit()]
        known |= {".".join(parts[i : i + len(wanted)]) for i in range(len(parts) - len(wanted) + 1)}
    if parent and any(f".{module}".endswith(f".{parent}") for module in modules):
        return [parent]  # a tensor of it, as indexer.k_norm.bias
    return find_closest(".".join(wanted), sorted(known))


def explain_splits(decoded: Collection[str], coded: Collection[str], patterns: Iterable[str]) -> list[str]:
    """A line for each sort of module that engines fuse and that is now plain in part only. `decoded`: modules that
    this conversion makes plain; `coded`: those that stay quantised."""
    patterns = [trim(pattern) for pattern in patterns]
    lines = []
    for leaf, partner in (*FUSED, *((b, a) for a, b in FUSED)):
        split = find_split(decoded, coded, leaf, partner)
        if split:
            renamed = [p.removesuffix(leaf) + partner for p in patterns if p.rpartition(".")[2] == leaf]
            exact = [f"{module_of(module)}.{partner}" for module in split]
            parents = {module_of(module).rpartition(".")[2] for module in split}
            general = sorted(f"{parent}.{name}" for parent in parents for name in (leaf, partner))
            cure = next(c for c in (renamed, exact[:1], general) if heals(c, decoded, coded, leaf, partner))
            lines.append(
                f"{', '.join(fold(split))}: plain now, but {partner} beside it stays quantised, and engines that fuse "
                f"the two take both or none; to upcast both, add {spell_options(cure)}"
            )
    plain, kept = ({found[1] for m in names if (found := EXPERTS.match(m))} for names in (decoded, coded))
    if plain & kept:
        roots = sorted(plain & kept, key=by_number)
        cure = [found[1] for p in patterns if (found := re.match(r"(.*\bexperts)(\.|$)", p))]
        if not all(is_matched(root, cure) for root in roots):
            cure = sorted({".".join(root.split(".")[-2:]) for root in roots})
        lines.append(
            f"{', '.join(fold(roots))}: plain now in part, and engines that fuse all experts of a layer take all or "
            f"none; to upcast all, add {spell_options(cure)}"
        )
    return lines


def find_split(decoded: Collection[str], coded: Collection[str], leaf: str, partner: str) -> list[str]:
    """The modules called `leaf` that are plain now, with a quantised `partner` beside them."""
    split = (m for m in decoded if m.endswith("." + leaf) and f"{module_of(m)}.{partner}" in coded)
    return sorted((m for m in split if not EXPERTS.match(m)), key=by_number)


def heals(cure: list[str], decoded: Collection[str], coded: Collection[str], leaf: str, partner: str) -> bool:
    """Whether upcasting these too leaves no such pair apart."""
    ends = (f".{leaf}", f".{partner}")
    more = {module for module in coded if module.endswith(ends) and is_matched(module, cure)}
    after, kept = more.union(decoded), set(coded) - more
    return not find_split(after, kept, leaf, partner) and not find_split(after, kept, partner, leaf)


def spell_options(patterns: Iterable[str]) -> str:
    return " ".join(f"--upcast {shlex.quote(pattern)}" for pattern in dict.fromkeys(patterns))
