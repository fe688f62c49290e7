"""Fixtures that several files of tests use. Without a CUDA device Triton's kernels run in its interpreter."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch

# A shell lets what it starts in the background ignore Ctrl-C, and children of that ignore it too: 20 tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["SACCADE_COMPILERS"] = "0"  # on a GPU each LLM of these tests would start processes of its own
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before the first import of saccade.kernels
    import interpreter

    interpreter.mend()
from commands import Ran, Run
from killed_conversions import digest
from small_checkpoints import small_config, small_tensors, write_small
from torch import Tensor

from saccade.cli.app import app
from saccade.convert.changes import Mode
from saccade.convert.convert import convert


def pytest_collection() -> None:
    gc.disable()  # until all is imported: 2 s of a core for each process of tests


def pytest_collection_finish() -> None:
    """What was imported stays: the collector, which goes through it 20 times in 100 s of tests, need not look at it."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else libraries complain of what is left at the end of the process


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def saccade(*args: str | Path) -> Ran:
        with pytest.raises(SystemExit) as end:
            app([str(a) for a in args], prog_name="saccade")
        out, err = capsys.readouterr()
        return Ran(end.value.code or 0, out, err)  # type: ignore[arg-type]

    return saccade


@pytest.fixture(scope="session")
def fp8_tensors() -> dict[str, Tensor]:
    """Every published tensor of a small FP8 model; not to be written to."""
    return small_tensors(small_config())


@pytest.fixture
def fp8_model(tmp_path: Path, fp8_tensors: dict[str, Tensor]) -> Path:
    """Those in three files, by the lengths of their names: most scales lie apart from their codes."""
    return write_small(tmp_path / "m", small_config(), fp8_tensors, lambda name: len(name) % 3)


@pytest.fixture(scope="session")
def bf16_digest(tmp_path_factory: pytest.TempPathFactory, fp8_tensors: dict[str, Tensor]) -> dict[str, str]:
    """What an uninterrupted `convert --bf16` makes of it: every file by content."""
    folder = tmp_path_factory.mktemp("wanted")
    write_small(folder / "m", small_config(), fp8_tensors, lambda name: len(name) % 3)
    convert(folder / "m", folder / "out", Mode("bf16"), threads=2)
    return digest(folder / "out")
