"""How the benches of kernels name their variants; what they time needs a GPU."""

import ast
from pathlib import Path

import pytest

from saccade import kernels
from saccade.kernels import skinny
from tools.kernel_bench.step import changed, main


def test_a_variant_holds_while_it_is_captured() -> None:
    knobs, most = skinny.KNOBS, skinny.LONG_BYTES
    with changed("skinny.KNOBS.stages=3,skinny.KNOBS.rows=32,skinny.LONG_BYTES=7"):
        now, long = skinny.KNOBS, skinny.LONG_BYTES
    assert now == knobs._replace(stages=3, rows=32) and long == 7
    assert skinny.KNOBS is knobs and most == skinny.LONG_BYTES


def test_no_constant_of_a_kernel_is_a_default_argument() -> None:
    """It would be taken when the function is defined, and a variant of it change nothing."""
    paths = sorted(Path(kernels.__path__[0]).glob("*.py"))
    bound = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:  # a kernel's are part of its source
                defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if isinstance(d, ast.Name)]
                bound += [f"{path.name}: {node.name}, {d.id}" for d in defaults if d.id.isupper()]
    assert len(paths) > 20 and not bound


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("skinny.KNOBS.stage=3", "has no KNOBS.stage"),
        ("expand.NINE=1", "has no NINE"),
        ("skinny=3", "expected module.NAME"),
        ("thin.KNOBS=3", "no module thin"),
        ("skinny.KNOBS.stages=many", "expected a Python literal"),
        ("skinny.LONG_BYTES.real=3", "has no LONG_BYTES.real"),
    ],
)
def test_a_misspelled_variant_is_named_and_changes_nothing(variant: str, said: str) -> None:
    knobs = skinny.KNOBS
    with pytest.raises(ValueError, match=said), changed(f"skinny.KNOBS.rows=32,{variant}"):
        pass
    assert skinny.KNOBS is knobs


def test_the_command_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["skinny.KNOBS.stage=3"])
    assert ended.value.code == 2 and "has no KNOBS.stage" in capsys.readouterr().err
