"""How the bench of whole steps compares them; what it times needs a GPU."""

from pathlib import Path

import pytest
import torch

from tools.kernel_bench.step import Run, describe_run, main, read_runs, save_runs

CASE = "batch 8, context 8192, 12 layers of v32-rank-of-8, exact"


def test_a_step_is_compared_with_the_one_that_was_saved(tmp_path: Path) -> None:
    run = Run(torch.tensor([[1.0, -4.0]]), 1.5, [("_split_k_kernel", 2.25), ("down", 1.0)])
    save_runs(tmp_path / "before", {CASE: run})
    before = read_runs(tmp_path / "before", [CASE])[CASE]
    assert before.logits.equal(run.logits) and before[1:] == run[1:]
    assert describe_run("now", run, before.logits) == (
        "now        1.500 ms, logits 0e+00 off,    3.2 us: split_k_kernel 2.2 down 1.0"
    )
    near, wrong = run._replace(logits=run.logits + 0.003), run._replace(logits=run.logits + 0.005)
    assert "WRONG" not in describe_run("now", near, before.logits)
    assert "WRONG   1.500 ms, logits 1e-03 off" in describe_run("now", wrong, before.logits)


def test_what_was_saved_with_other_options_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_runs(tmp_path / "before", {CASE: Run(torch.zeros(1), 1.0, [])})
    for path, said in (
        (tmp_path / "before", f"found {CASE}; save it with the same options"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--batch", "7", "--against", str(path)])
        assert ended.value.code == 2 and said in capsys.readouterr().err
