"""Programs that look for faults: canitoolcall's probe, and schemathesis against the server's own description."""

import subprocess
import sys
from pathlib import Path

from canitoolcall.probe import probe
from served_model import ServedModel

# A request may be right in form and still ask for more than this model has: too many tokens, another model.
EXCLUDED = "positive_data_acceptance"


def test_canitoolcall_finds_nothing(scripted: ServedModel) -> None:
    report = probe(f"{scripted.url}/v1", "scripted")
    told = report.render_text()
    assert report.summary() == {"pass": 27, "fail": 0, "error": 0, "skip": 0}, told
    assert not any(outcome.warnings for outcome in report.outcomes), told


def test_schemathesis_finds_nothing(scripted: ServedModel, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    line = [program, "run", f"{scripted.url}/openapi.json", "--exclude-checks", EXCLUDED, "--max-examples", "5"]
    line += ["--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--warnings", "off"]
    ran = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert scripted.client.get("/health").status_code == 200
