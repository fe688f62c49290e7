"""Numbers of a source tree: files, lines, imports, and names that are defined in two modules.

`python -m tools.structure [folder of the package]` prints them as a table. The folder may be of another commit, from
`git worktree` or `git archive`. tests/project/test_names.py uses `find_doubles`.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent.parent / "src" / "saccade"


def list_names(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Public names that a module defines at its top level, but for type variables and commands of the command line.

    A type variable means nothing outside its signature. A command's function is called as the user calls it.
    """
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any(".command(" in ast.unparse(d) for d in node.decorator_list):
                names = [node.name]
        elif isinstance(node, ast.Assign) and not ast.unparse(node.value).startswith("TypeVar("):
            names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from ((name, node) for name in names if not name.startswith("_"))


def read_trees(package: Path) -> dict[str, ast.Module]:
    """Path below the package -> its syntax tree."""
    return {str(p.relative_to(package)): ast.parse(p.read_text()) for p in sorted(package.rglob("*.py"))}


def find_doubles(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Name -> modules, for names that more than one module defines.

    A kernel may have the name of the operation in kernels/reference.py that specifies it: that is one meaning. So is
    what files of one name in the folders of two model families define: the same of each family.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        for name, _ in list_names(tree):
            found[name].add(path)
    return {
        name: sorted(paths)
        for name, paths in sorted(found.items())
        if len(paths) > 1
        and not ("kernels/reference.py" in paths and len(paths) == 2 and is_of_kernels(paths))
        and not is_of_families(paths)
    }


def is_of_families(paths: set[str]) -> bool:
    """models/FAMILY/FILE, with the same FILE each."""
    parts = [path.split("/") for path in paths]
    return all(len(p) == 3 and p[0] == "models" for p in parts) and len({p[2] for p in parts}) == 1


def is_of_kernels(paths: set[str]) -> bool:
    return all(path.startswith("kernels/") for path in paths)


def find_edges(trees: Mapping[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Module or package at the top -> those that it imports, late and typing imports included."""
    edges: dict[str, set[str]] = {}
    for path, tree in trees.items():
        own = path.split("/")[0].removesuffix(".py")
        if path == "__init__.py":
            continue
        found = edges.setdefault(own, set())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] if node.module != package else [f"{package}.{a.name}" for a in node.names]
            parts = [name.split(".") for name in names]
            found |= {p[1] for p in parts if p[0] == package and len(p) > 1 and not p[1].startswith("_")}
        found.discard(own)
    return {own: found & set(edges) for own, found in edges.items()}


def find_circles(trees: Mapping[str, ast.Module], package: str) -> set[str]:
    """Modules that import each other in a circle, or stand above one; typing imports included. The names of the
    package itself are fetched on first use."""
    names = {
        f"{package}." + path.removesuffix(".py").replace("/", "."): path for path in trees if path != "__init__.py"
    }
    needs: dict[str, set[str]] = {}
    for name, path in names.items():
        found: set[str] = set()
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        needs[name] = {n for n in found if n in names and n != name}
    while free := {name for name, wants in needs.items() if not wants}:
        needs = {name: wants - free for name, wants in needs.items() if name not in free}
    return set(needs)


def measure_depth(edges: Mapping[str, set[str]]) -> int:
    """The longest chain of imports."""
    reached = {own: set(found) for own, found in edges.items()}
    for _ in edges:
        reached = {own: found.union(*(reached[f] for f in found)) for own, found in reached.items()}
    depth: dict[str, int] = {}

    def count(own: str) -> int:
        if own not in depth:
            below = [f for f in edges[own] if own not in reached[f]]
            depth[own] = 1 + max(map(count, below), default=0)
        return depth[own]

    return max(map(count, edges), default=0)


def main(package: Path) -> None:
    trees = read_trees(package)
    lines = {path: len((package / path).read_text().splitlines()) for path in trees}
    edges = find_edges(trees, package.name)
    folders = Counter(str(Path(path).parent) for path in trees if not path.endswith("__init__.py"))
    doubles = find_doubles(trees)
    (longest, most), (folder, files) = max(lines.items(), key=lambda i: i[1]), folders.most_common(1)[0]
    rows = {
        "modules and packages at the top": len(edges),
        "longest chain of imports": measure_depth(edges),
        "import edges between them": sum(map(len, edges.values())),
        "modules that import in a circle": len(find_circles(trees, package.name)),
        "names defined in two modules": len(doubles),
        "files": len(trees),
        "most files in a folder": f"{files} ({folder})",
        "longest file, lines": f"{most} ({longest})",
        "lines": sum(lines.values()),
    }
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
