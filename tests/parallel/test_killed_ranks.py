"""A rank comes to harm: the whole job ends soon, says which rank and why, and leaves nothing behind."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from killed_ranks import run_harmed

SAID = {
    "kill": "was killed by SIGKILL",
    "stop": "is stopped by a signal",
    "raise": r"failed: ValueError: a fault of this layer",
    "memory": "failed: no memory for a step's activations",
}


def check(rank: int, kind: str, moment: float, tp: int) -> None:
    harmed = run_harmed(rank, kind, moment, tp)
    assert harmed.came_in, "the job had ended before"
    what = f"rank {rank} of {tp}, {kind} after {moment:.2f} s: exit code {harmed.code}\n{harmed.err}"
    assert re.search(rf"saccade: rank {rank} on \S+ {SAID[kind]}.*; the {tp} ranks have ended", harmed.err), what
    assert harmed.code == 2 and len(harmed.err.strip().splitlines()) == 1, what
    assert not harmed.left and not harmed.shared, what
    # "raise" and "memory" count from a moment before the harm: the rank has to come up first.
    assert harmed.seconds < (10 if kind in ("kill", "stop") else 30), what


@pytest.mark.parametrize(("kind", "moment"), [("kill", 0.3), ("stop", 3.0), ("raise", 1.0)])
def test_one_rank_ends_all(kind: str, moment: float) -> None:
    check(1, kind, moment, 2)


@pytest.mark.soak
def test_random_ranks_at_random_moments_of_loading_and_running() -> None:
    dice = random.Random(19)
    for i in range(20):
        tp = dice.choice((2, 2, 4))
        check(dice.randrange(1, tp), list(SAID)[i % 4], dice.uniform(0, 8), tp)


@pytest.mark.soak
def test_a_rank_that_computes_otherwise_is_named() -> None:
    harmed = run_harmed(1, "twist", 1.0, 2, "--check-ranks")
    said = "rank 1 on .* computes otherwise than rank 0: the first that differ are hidden states of model.layers.0.self_attn;"
    assert harmed.code == 2 and re.search(said, harmed.err), harmed.err


@pytest.mark.soak
def test_nothing_is_left_when_rank_0_is_killed() -> None:
    for moment in (0.0, 0.5, 3.0, 6.0):
        harmed = run_harmed(0, "kill", moment, 2)
        assert harmed.code == -9 and not harmed.left and not harmed.shared, (moment, harmed)


@pytest.mark.soak
def test_a_full_dev_shm_is_no_obstacle(tmp_path: Path) -> None:
    """In a namespace of its own, where /dev/shm has one page, and that is taken."""
    command = (
        "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full &&"
        f" exec {sys.executable} -m saccade generate --tp 2 --prompt 'Tom has 12 apples.' --max-tokens 8"
    )
    ran = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True)
    if "unshare" in ran.stderr:
        pytest.skip("no namespaces here")
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
