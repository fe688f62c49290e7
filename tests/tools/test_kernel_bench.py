"""How the benches of kernels name their variants; what they time needs a GPU."""

import ast
from pathlib import Path

import pytest

from saccade import kernels
from saccade.kernels.linear import split_k
from tools.kernel_bench.step import changed, main


def test_a_variant_holds_while_it_is_captured() -> None:
    config, most = split_k.SPLIT_K, split_k.LONG_BYTES
    with changed("linear.split_k.SPLIT_K.stages=3,linear.split_k.SPLIT_K.rows=32,linear.split_k.LONG_BYTES=7"):
        now, long = split_k.SPLIT_K, split_k.LONG_BYTES
    assert now == config._replace(stages=3, rows=32) and long == 7
    assert split_k.SPLIT_K is config and most == split_k.LONG_BYTES


def test_no_constant_of_a_kernel_is_a_default_argument() -> None:
    """It would be taken when the function is defined, and a variant of it change nothing."""
    paths = sorted(Path(kernels.__path__[0]).rglob("*.py"))
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
        ("linear.split_k.SPLIT_K.stage=3", "has no SPLIT_K.stage"),
        ("moe.gate_up.NINE=1", "has no NINE"),
        ("linear.split_k=3", "expected folder.module.NAME"),
        ("linear.thin.CONFIG=3", "no module linear.thin"),
        ("linear.split_k.SPLIT_K.stages=many", "expected a Python literal"),
        ("linear.split_k.LONG_BYTES.real=3", "has no LONG_BYTES.real"),
    ],
)
def test_a_misspelled_variant_is_named_and_changes_nothing(variant: str, said: str) -> None:
    config = split_k.SPLIT_K
    with pytest.raises(ValueError, match=said), changed(f"linear.split_k.SPLIT_K.rows=32,{variant}"):
        pass
    assert split_k.SPLIT_K is config


def test_the_command_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["linear.split_k.SPLIT_K.stage=3"])
    assert ended.value.code == 2 and "has no SPLIT_K.stage" in capsys.readouterr().err
