"""lm-evaluation-harness, unchanged: `local-completions` on the bundled model's problems, and log-likelihoods."""

import json
import subprocess
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from served_model import ANSWER, PYTHON, QUESTION, ServedModel

PROBLEMS = 24
BEGIN = "<|begin|>"
DRAW = """
import json, sys
from saccade.eval.tasks import draw_test
for i in range(int(sys.argv[1])):
    print(json.dumps(draw_test("story", i, 128)._asdict()))
"""


def run(*line: str) -> str:
    return subprocess.run([PYTHON, *line], capture_output=True, text=True, check=True, timeout=300).stdout


def test_exact_match_equals_saccade_eval(bundled: ServedModel, tmp_path: Path) -> None:
    data = tmp_path / "problems.jsonl"
    data.write_text(run("-c", DRAW, str(PROBLEMS)))
    task = {
        "task": "saccade_problems",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{result}}",
        "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": 100, "do_sample": False},
        "filter_list": [
            {
                "name": "result",
                "filter": [{"function": "regex", "regex_pattern": "#### (.*)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    arguments = f"model=saccade-bundled,base_url={bundled.url}/v1/completions,tokenizer_backend=None,num_concurrent=8"
    found = lm_eval.simple_evaluate(
        model="local-completions", model_args=arguments, tasks=[task], task_manager=TaskManager(), bootstrap_iters=0
    )
    share = found["results"]["saccade_problems"]["exact_match,result"]
    told = run(
        "-m",
        "saccade",
        "eval",
        "--problems",
        str(PROBLEMS),
        "--task",
        "story",
        "--tokens",
        "128",
        "--probed",
        "0",
        "--json",
    )
    (match,) = json.loads(told)["matches"]
    assert share == match["share"] and match["problems"] == PROBLEMS


def test_log_likelihoods_equal_scores(bundled: ServedModel) -> None:
    """With the tokenizer of the server, which the harness finds by itself. It never asks for a beginning token."""
    model: Any = LocalCompletionsAPI(base_url=f"{bundled.url}/v1/completions", model="saccade-bundled", max_length=4096)
    asked = [Instance("loglikelihood", {}, (BEGIN + QUESTION, text), 0) for text in (ANSWER, "\n12 - 7 = 5")]
    (right, is_greedy), (wrong, is_other) = model.loglikelihood(asked)
    assert is_greedy and not is_other and right > -0.1 > wrong
    scored = json.loads(run("-m", "saccade", "score", "--text", QUESTION + ANSWER, "--json"))
    assert right == pytest.approx(sum(scored["logprobs"][19:]), abs=1e-3)
