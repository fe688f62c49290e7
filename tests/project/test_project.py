"""Promises about the tree: imports go one way, the loader's brain needs no torch, the map is complete."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import saccade
from tools.structure import find_circles, read_trees

PACKAGE = Path(saccade.__file__).parent
ROOT = PACKAGE.parent.parent

# A room may import from its own line and those above it. A family's description (registry, config, parameters, cache
# rows) stands beside the config, which it reads; its forward pass is `models`.
ROOMS = (
    {"errors", "base"},
    {"config", "families"},
    {"checkpoint"},
    {"plan"},
    {"kernels"},
    {"weights", "parallel"},
    {"ops"},
    {"models"},
    {"text", "chat", "engine"},
    {"api"},
    {"inspect", "convert", "eval", "compare", "look", "bench", "server", "fleet"},
    {"cli"},
    {"__main__"},
)
DESCRIPTIONS = ("registry", "config", "parameters", "cache_rows")  # of model families
# And these not at all, though they stand above.
BLIND = {
    "config": {"families"},  # keys, not what they mean
    "models": {"checkpoint", "plan", "engine"},  # knows neither files nor requests
    "kernels": {"checkpoint", "plan", "config"},  # numbers only
    "text": {"engine"},  # tokens only
    "chat": {"engine"},  # texts only
    "parallel": {"checkpoint", "plan"},  # tensors, bytes and processes
    "engine": {"checkpoint", "plan"},  # no files
}
TORCH_FREE = (
    "saccade", "saccade.errors", "saccade.models.dsa.config", "saccade.engine.params", "saccade.api.loading.side_files", "saccade.text.detokenize", "saccade.chat.find", "saccade.chat.answer", "saccade.base.limits", "saccade.api.settings.threads", "saccade.engine.scheduler", "saccade.engine.pace", "saccade.api.settings.resolve", "saccade.api.settings.devices", "saccade.api.settings.conflicts", "saccade.models.registry", "saccade.cli.app",
    "saccade.checkpoint.header", "saccade.checkpoint.index", "saccade.checkpoint.encoding", "saccade.checkpoint.coding", "saccade.checkpoint.open",
    "saccade.checkpoint.hub.remote", "saccade.checkpoint.hub.fetch", "saccade.base.memory", "saccade.plan", "saccade.plan.show", "saccade.plan.explain",
    "saccade.plan.diff", "saccade.cli.terminal", "saccade.cli.prompts", "saccade.cli.many.answer", "saccade.inspect.findings", "saccade.inspect.show",
    "saccade.convert.changes", "saccade.convert.configs", "saccade.convert.modules", "saccade.convert.target",
    "saccade.convert.others", "saccade.convert.links", "saccade.convert.place", "saccade.base.disk",
)  # fmt: skip


def find_room(parts: Sequence[str]) -> str:
    """The room of a module, by its path below the package."""
    return "families" if parts[0] == "models" and parts[-1] in DESCRIPTIONS else parts[0]


def imports() -> Iterator[tuple[Path, str, str]]:
    """(file, its room, the room it imports from), for all imports inside the package, late and typing ones too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "__init__.py":  # its names are fetched on first use
            continue
        room = find_room(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] if node.module != "saccade" else [f"saccade.{a.name}" for a in node.names]
            for name in names:
                if name.startswith("saccade.") and not name.endswith("__version__"):
                    yield path, room, find_room(name.split(".")[1:])


def test_imports_go_one_way() -> None:
    rank = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    wrong = [f"{path.relative_to(ROOT)} imports {to}" for path, room, to in imports() if rank[to] > rank[room]]
    assert not wrong and len(ROOMS) <= 13


def test_no_room_sees_what_it_must_not_know() -> None:
    wrong = [f"{path.relative_to(ROOT)} imports {to}" for path, room, to in imports() if to in BLIND.get(room, ())]
    assert not wrong


def test_modules_import_in_no_circle() -> None:
    """Typing imports included. Two modules of a circle are found, one of a chain is not."""
    assert not find_circles(read_trees(PACKAGE), "saccade")
    texts = {
        "a.py": "from saccade.b import x",
        "b.py": "from saccade import a",
        "c.py": "",
        "d.py": "from saccade import c",
    }
    trees = {path: ast.parse(text) for path, text in texts.items()}
    assert find_circles(trees, "saccade") == {"saccade.a", "saccade.b"}


def test_a_folder_is_a_room_and_no_hall() -> None:
    """At most 14 files of Python."""
    counts = Counter(path.parent for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > 14} == {}


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
