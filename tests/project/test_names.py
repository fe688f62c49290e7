"""A public name means one thing in the whole package."""

import ast

from tools.structure import HERE, find_doubles, read_trees

# Names that several modules may define: "Shape" is tuple[int, ...] both times, as parameters of families and encodings
# of files do not know each other. "main" is the entry point of a program, of which every file may be one.
ALLOWED = {"Shape": ["checkpoint/encoding.py", "models/parameters.py"]}


def test_a_public_name_has_one_definition() -> None:
    found = find_doubles(read_trees(HERE))
    del found["main"]
    assert found == ALLOWED


def test_a_second_definition_is_found() -> None:
    """Constants and classes too; the reference of a kernel, a type variable, a command and a private name are none."""
    one, two = "BLOCK = 128\nclass Step: ...\n", "A, BLOCK = 1, 2\nStep: int = 1\n"
    private = "T = TypeVar('T')\n_x = 1\n@app.command(name='check')\ndef check(): ...\n"
    kernel = "def select(): ...\n"
    files = {
        "plan/types.py": one, "kernels/a.py": two + private + kernel, "cli/app.py": private + "def check2(): ...",
        "plan/check.py": "def check(): ...", "kernels/reference.py": kernel,
    }  # fmt: skip
    trees = {path: ast.parse(text) for path, text in files.items()}
    assert sorted(find_doubles(trees)) == ["BLOCK", "Step"]
    trees |= {f"models/{family}/config.py": ast.parse("USED = ()\n") for family in ("one", "two")}  # one role
    assert sorted(find_doubles(trees)) == ["BLOCK", "Step"]
    trees["ops/gpu.py"] = ast.parse(kernel)  # a third one, outside of the kernels
    assert sorted(find_doubles(trees)) == ["BLOCK", "Step", "select"]
