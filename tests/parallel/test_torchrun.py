"""torchrun starts the ranks: rank 0 alone speaks, and ranks that do not belong together are refused by name."""

import shutil
from pathlib import Path

import pytest
from small_checkpoints import small_config, small_tensors, write_small
from torchrun_ranks import run_agents

from saccade import LLM, SamplingParams
from saccade.errors import RankError
from saccade.parallel.place import RankPlace, choose_place, find_place

PROMPT = "Tom has 12 apples."
PLACED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.mark.soak
def test_two_nodes_generate() -> None:
    options = ["generate", "--tp", "2", "--prompt", PROMPT, "--max-tokens", "12", "--dtype", "float32"]
    first, second = run_agents([options, options])
    wanted = LLM(dtype="float32", device="cpu").generate(PROMPT, SamplingParams(max_tokens=12))[0].text
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out.strip() == (wanted or "").strip() and second.out == ""


@pytest.mark.soak
def test_ranks_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    """Another checkpoint under the same name, another command line, another number of ranks."""
    folders = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        values = small_config(n_routed_experts=16) if seed else small_config()
        write_small(folder / "m", values, small_tensors(values))
    score = ["score", "m", "--tp", "2", "--tokens", "1,2,3"]
    first, _ = run_agents([score, score], folders)
    assert "saccade: rank 1 on " in first.err and "sees a checkpoint with the hash" in first.err, first.err
    shutil.rmtree(folders[1] / "m")
    shutil.copytree(folders[0] / "m", folders[1] / "m")
    first, _ = run_agents([score, [*score, "--dtype", "float32"]], folders)
    assert "rank 1" in first.err and "was started with" in first.err and "dtype=float32" in first.err, first.err
    first, _ = run_agents([["score", "m", "--tokens", "1,2"]] * 2, folders)
    assert "torchrun started 2 ranks, but 1 share" in first.err, first.err


def test_the_place_is_torchruns() -> None:
    assert find_place({}) is None and choose_place(2, {}) == RankPlace(0, 2, 0, 2, is_own=True)
    assert choose_place(4, PLACED) == RankPlace(3, 4, 1, 2, is_own=False)
    assert choose_place(1, PLACED) == RankPlace(0, 1, 0, 1)  # a model of one rank is each process' own
    for wrong in ({"RANK": "x"}, {"LOCAL_RANK": ""}, {"RANK": "4"}, {"MASTER_ADDR": ""}):
        with pytest.raises(RankError):
            choose_place(4, PLACED | wrong)
    with pytest.raises(RankError, match="torchrun started 4 ranks, but 2 share the model"):
        choose_place(2, PLACED)
