"""Fixtures that several files of tests use. Without a CUDA device Triton's kernels run in its interpreter."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before the first import of saccade.kernels
    import interpreter

    interpreter.mend()
from commands import Ran, Run

from saccade.cli import app


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def saccade(*args: str | Path) -> Ran:
        with pytest.raises(SystemExit) as end:
            app([str(a) for a in args], prog_name="saccade")
        out, err = capsys.readouterr()
        return Ran(end.value.code or 0, out, err)  # type: ignore[arg-type]

    return saccade
