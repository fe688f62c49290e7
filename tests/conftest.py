"""Fixtures that several files of tests use."""

from pathlib import Path

import pytest
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
