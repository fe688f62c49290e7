"""Benchmarks: what they compare is the same work, what they print are its figures, and nonsense is refused at once."""

from pathlib import Path

import pytest
from commands import Ran, Run
from small_checkpoints import small_config, small_tensors, write_small

from saccade.bench.files import reads
from saccade.bench.files.check import bench_check, check_once
from saccade.bench.files.load import bench_load, load_once
from saccade.bench.files.reads import read_into_memory, read_through


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    return write_small(tmp_path_factory.mktemp("model"), config, small_tensors(config), lambda name: len(name) % 3)


@pytest.mark.parametrize("command", ["load", "check"])
@pytest.mark.parametrize(("option", "value"), [("pairs", "0"), ("pairs", "-1"), ("threads", "0")])
def test_a_senseless_bench_is_refused_before_2_gb_are_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, option: str, value: str
) -> None:
    monkeypatch.setattr(reads, "write_checkpoint", lambda *_, **__: pytest.fail("written"))
    found = run("bench", command, f"--{option}={value}")
    assert found == Ran(2, "", f"saccade: {option}: expected an integer of at least 1, found {value}\n")


def test_digests_that_are_not_there_are_refused_before_2_gb_are_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "write_checkpoint", lambda *_, **__: pytest.fail("written"))
    ran = run("bench", "check", "--sha256", "none.txt")
    assert ran == Ran(2, "", "saccade: sha256: expected a file of digests, found 'none.txt'\n")


def test_each_job_reads_the_checkpoint(root: Path) -> None:
    assert read_through(str(root))["seconds"] > 0 and read_into_memory(str(root))["seconds"] > 0
    assert check_once(str(root), 2, None)["problems"] == 0
    assert load_once(str(root), 2, "cpu")["tensors"] > 50


@pytest.mark.parametrize(("name", "bench"), [("load", bench_load), ("check", bench_check)])
def test_the_figure_is_the_median_ratio_of_a_pair(
    name: str, bench: object, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain reads of 2 s and jobs of 3, 8 and 5 s; the first read warms the page cache and is not counted."""
    seconds = {True: [9.0, 2.0, 2.0, 2.0], False: [3.0, 8.0, 5.0]}

    def pretend(job: object, *_: object) -> dict[str, float]:
        return {"seconds": seconds[job in (read_through, read_into_memory)].pop(0), "extra_bytes": 1 << 20}

    monkeypatch.setattr(reads, "in_process", pretend)
    found = bench(str(root), pairs=3)  # type: ignore[operator]
    assert seconds == {True: [], False: []}
    assert found["median_times_plain"] == 2.5 and found["most_extra_mib"] == 1
    size = sum(path.stat().st_size for path in root.glob("*.safetensors"))
    assert found["file_bytes"] == size and found[f"median_{name}_gb_s"] == size / 5 / 1e9
