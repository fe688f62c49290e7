"""latent_cache="fp8" in the engine: another rounding, in half the bytes, and nothing else that a request could see."""

import pytest
import torch
from announcements import announce
from small_checkpoints import small_config, small_tensors, write_small

from saccade.api.llm import LLM
from saccade.engine.params import SamplingParams

SIZES = dict(device="cpu", cache_tokens=2048, max_batch_tokens=96, max_requests=8)
PROMPTS = [[(7 * i + 3 * p) % 320 for i in range(120)] for p in range(4)]  # longer than index_topk, 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)  # over the border of the second page


@pytest.fixture(scope="module")
def tensors():
    """Two sets of weights of one model with an MTP layer."""
    return [small_tensors(small_config(), seed, mtp_copies=False) for seed in (0, 1)]


@pytest.fixture(scope="module")
def roots(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_small(folder / str(i), small_config(), t) for i, t in enumerate(tensors)]


def open_fp8(root, **options):
    return LLM(root, **{**SIZES, "latent_cache": "fp8", **options})


def ask(llm):
    return [made.token_ids for made in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def answers(roots):
    """What each set of weights answers, one request after the other, without anything that reuses rows."""
    found = []
    for root in roots:
        llm = open_fp8(root, prefix_cache=False, max_requests=1)
        found.append([llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS])
    assert found[0] != found[1]
    return found


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_fp8_latents_are_fewer_bytes_and_another_rounding(roots, dtype):
    plain, fp8 = (LLM(roots[0], dtype=dtype, latent_cache=how, **SIZES) for how in ("bf16", "fp8"))
    assert (plain.settings.latent_cache, fp8.settings.latent_cache) == ("bf16", "fp8")
    assert "latent_cache      fp8" in str(fp8.settings)
    c, number = fp8.config, 2 if dtype == "auto" else 4
    saved = (c.kv_lora_rank * (number - 1) - 4) * (c.num_hidden_layers + 1) * (SIZES["cache_tokens"] + 64)
    assert plain.settings.cache_bytes - fp8.settings.cache_bytes == saved
    assert all(pool.scales is not None for pool in fp8.engine.cache.latent)
    found, wanted = (torch.tensor(llm.score(PROMPTS[0])) for llm in (fp8, plain))
    off = ((found - wanted) / wanted).abs()
    assert 1e-4 < off.mean() < 0.05 and off[0] > 0  # the first latent is rounded already


def test_found_pages_hold_what_was_computed(roots, answers):
    llm = open_fp8(roots[0])
    first, again = llm.generate(PROMPTS[0], GREEDY)[0], llm.generate(PROMPTS[0], GREEDY)[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, 64)
    assert first.token_ids == again.token_ids == answers[0][0]
    keys = [open_fp8(roots[0], latent_cache=how).engine.scheduler._prefix._keys.root for how in ("fp8", "bf16")]
    assert llm.engine.scheduler._prefix._keys.root == keys[0] != keys[1]


def test_drafts_change_no_text(roots, answers):
    llm = open_fp8(roots[0], speculate=3)
    assert ask(llm) == answers[0] and llm.stats.tally.shares


def test_requests_that_are_taken_back_begin_anew(roots, answers):
    llm = open_fp8(
        roots[0], cache_tokens=640, prefix_cache=False
    )  # ten pages: four requests begin with two and need three
    assert ask(llm) == answers[0]
    assert llm.engine.scheduler.preemptions > 0


def test_pushed_weights_write_their_own_rows(roots, tensors, answers):
    llm = open_fp8(roots[0])
    assert ask(llm) == answers[0]
    with llm.push(announce(tensors[1])) as push:
        for name, tensor in tensors[1].items():
            push.feed(name, tensor)
        push.finish()
    assert ask(llm) == answers[1]


def test_selections_and_scores_are_whole(roots, answers):
    llm = open_fp8(roots[0])
    (made,) = llm.generate(PROMPTS[0], GREEDY, capture_selection=True)
    assert made.token_ids == answers[0][0] and made.selections is not None
    assert len(made.selections[0]) == len(PROMPTS[0]) + len(made.token_ids) - 1
    again = open_fp8(roots[0], max_batch_tokens=40).score(PROMPTS[0])
    assert llm.score(PROMPTS[0]) == pytest.approx(again, abs=1e-4)
