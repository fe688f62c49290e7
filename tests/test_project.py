"""Promises about the tree: imports go one way, the loader's brain needs no torch, the map is complete."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import saccade

PACKAGE = Path(saccade.__file__).parent
ROOT = PACKAGE.parent.parent

# A module may import from its own line and those above it.
ORDER = (
    {"printable"},
    {"errors", "disk", "interrupt", "json_text", "near", "strict_json"},
    {"memory"},
    {"terminal", "hold"},
    {"config_keys", "limits"},
    {"config_foreign"},
    {"config_rope"},
    {"config", "params"},
    {"cache_bytes"},
    {"checkpoint"},
    {"plan"},
    {"threads"},
    {"kernels"},
    {"decode"},
    {"steps"},
    {"weights"},
    {"inspect", "convert"},
    {"ops"},
    {"batch", "cache"},
    {"models"},
    {"causes"},
    {"sample"},
    {"speculate"},
    {"graphs"},
    {"stops"},
    {"pace", "scheduler", "settings", "text", "tokenizer"},
    {"side"},
    {"job"},
    {"engine", "turns"},
    {"shared"},
    {"push", "machine"},
    {"prepare"},
    {"answers", "llm"},
    {"bench", "eval"},
    {"options", "usage"},
    {"prompts"},
    {"many"},
    {"cli_bench", "cli_run"},
    {"cli"},
    {"__main__"},
)
# And these not at all, though they stand above.
BLIND = {
    "models": {"checkpoint", "plan", "params"},  # knows neither files nor requests
    "kernels": {"checkpoint", "plan", "config"},  # numbers only
    "scheduler": {"cache", "batch", "models", "ops", "weights", "checkpoint", "plan"},  # requests only
    "engine": {"checkpoint", "plan", "weights"},  # no files
}
TORCH_FREE = (
    "saccade", "saccade.errors", "saccade.config", "saccade.params", "saccade.side", "saccade.text", "saccade.limits", "saccade.threads", "saccade.scheduler", "saccade.pace", "saccade.settings", "saccade.cache_bytes", "saccade.cli",
    "saccade.checkpoint.header", "saccade.checkpoint.index", "saccade.checkpoint.encoding", "saccade.checkpoint.coding", "saccade.checkpoint.open",
    "saccade.checkpoint.remote", "saccade.checkpoint.fetch", "saccade.memory", "saccade.plan", "saccade.plan.show", "saccade.plan.explain",
    "saccade.plan.diff", "saccade.terminal", "saccade.prompts", "saccade.many", "saccade.inspect.findings", "saccade.inspect.show",
    "saccade.convert.changes", "saccade.convert.configs", "saccade.convert.modules", "saccade.convert.target",
    "saccade.convert.others", "saccade.convert.links", "saccade.convert.place", "saccade.disk",
)  # fmt: skip


def imports() -> Iterator[tuple[Path, str, str]]:
    """(file, its place, the place it imports from), for all imports inside the package, late and typing ones too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if (
                    name.startswith("saccade.") and path != PACKAGE / "__init__.py"
                ):  # its names are fetched on first use
                    yield path, place, name.split(".")[1]


def test_imports_go_one_way() -> None:
    rank = {place: i for i, places in enumerate(ORDER) for place in places}
    wrong = [f"{path.relative_to(ROOT)} imports {to}" for path, place, to in imports() if rank[to] > rank[place]]
    assert not wrong


def test_no_module_sees_what_it_must_not_know() -> None:
    wrong = [f"{path.relative_to(ROOT)} imports {to}" for path, place, to in imports() if to in BLIND.get(place, ())]
    assert not wrong


def test_planning_and_scheduling_import_no_torch() -> None:
    program = f"import sys, {', '.join(TORCH_FREE)}\nassert 'torch' not in sys.modules, 'torch'"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def mapped(lines: list[str]) -> Iterator[str]:
    """The paths in the map: a folder is deeper than the one above it, and files of one line share a folder."""
    folders: list[tuple[int, str]] = []
    for line in lines:
        depth = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= depth:
            folders.pop()
        above = folders[-1][1] if folders else ""
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            yield above + name
            if name.endswith("/"):
                folders.append((depth, above + name))


def test_the_map_names_every_file() -> None:
    """Each file of the package and of tools/ stands in the map, in its folder; the map names nothing that is not there.

    A folder of tools/ may stand for its files; those of the package are named one by one.
    """
    text = (ROOT / "docs" / "map.md").read_text()
    named = list(mapped(text.split("```")[1].strip().splitlines()))
    assert len(set(named)) == len(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
    there = {str(p.relative_to(ROOT)) for folder in (PACKAGE, ROOT / "tools") for p in folder.rglob("*.py")}
    whole = tuple(name for name in named if name.startswith("tools/") and name.endswith("/"))
    there = {p for p in there if not p.endswith(("__init__.py", "__main__.py")) and not p.startswith(whole)}
    assert sorted(there ^ {name for name in named if name.endswith(".py")}) == []
