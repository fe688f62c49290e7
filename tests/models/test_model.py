"""The model against transformers, and against itself in other batches. Contexts are at least four times index_topk:
below it an indexer selects everything, and one that is wrong does not show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assemble, empty_cache, full_batch, page_table, step_batch, tiny_config, tiny_dict, tiny_tensors
from torch import Tensor
from transformers_models import (
    CONFIGS,
    GLM,
    SHARED,
    MtpOracle,
    draw_tokens,
    find_log_probs,
    make_oracle,
    save_oracle,
    yarn,
)

from saccade.engine.pages import allocate_cache, count_page_bytes
from saccade.kernels import PAGE
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference


def find_log_probs_of_ours(model: Transformer, prompts: list[list[int]], padding: int = 0) -> Tensor:
    """[T, vocab] of whole prompts in one step."""
    batch = full_batch(prompts, padding)
    hidden = model.forward(batch, empty_cache(model.config, batch))
    return model.logits(hidden[: len(hidden) - padding]).log_softmax(-1)


# Parity.


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_equal_those_of_transformers(
    name: str, tmp_path: Path, record_testsuite_property: Any
) -> None:
    values = tiny_dict(**CONFIGS[name])
    oracle = make_oracle(values)
    config = ModelConfig.from_dict(values)
    model = Transformer(config, assemble(config, save_oracle(oracle, tmp_path)), Reference())
    tokens = draw_tokens(150)
    difference = (find_log_probs_of_ours(model, [tokens]) - find_log_probs(oracle, tokens)).abs().max().item()
    record_testsuite_property(f"largest difference, {name}", difference)
    print(f"{name}: log-probabilities differ by at most {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize(("changes", "latent"), [(GLM, 1e-5), ({"rms_norm_eps": 1e-5}, 1e-6)], ids=["glm", "deepseek"])
def test_latent_norms_have_the_eps_of_their_family(changes: dict[str, Any], latent: float, tmp_path: Path) -> None:
    """The config's for GLM, 1e-6 whatever it says for DeepSeek. Their inputs are made small, or it would not show."""
    values = tiny_dict(**changes)
    oracle = make_oracle(values)
    for name, weight in oracle.named_parameters():
        if any(part in name for part in ("q_a_proj", "kv_a_proj", "indexer.wk.")):
            weight.data *= 0.003
    config = ModelConfig.from_dict(values)
    model = Transformer(config, assemble(config, save_oracle(oracle, tmp_path)), Reference())
    tokens = draw_tokens(150)
    expected = find_log_probs(oracle, tokens)
    assert (find_log_probs_of_ours(model, [tokens]) - expected).abs().max() < 1e-4
    assert config.latent_norm_eps == latent and config.rms_norm_eps == 1e-5
    for is_query in (True, False):  # with the other family's eps each of them shows
        set_latent_eps(model, is_query, 1.1e-5 - latent)
        assert (find_log_probs_of_ours(model, [tokens]) - expected).abs().max() > 1e-3, is_query
        set_latent_eps(model, is_query, latent)


def set_latent_eps(model: Transformer, is_query: bool, eps: float) -> None:
    """Of the norm of queries, or of latents."""
    for layer in model.layers:
        a = layer.attention
        if is_query:
            a.queries = a.queries._replace(norm=a.queries.norm._replace(eps=eps))
        else:
            a.kv_a_norm = a.kv_a_norm._replace(eps=eps)


def test_the_rope_layout_of_the_indexer_follows_its_config_key(tmp_path: Path) -> None:
    """Interleaved RoPE on interleaved columns is half-split RoPE on halves: transformers has V3.2 in halves only."""
    values = tiny_dict()
    oracle = make_oracle(values)
    tensors = save_oracle(oracle, tmp_path)
    rope = values["qk_rope_head_dim"]
    order = torch.arange(rope).view(2, -1).T.flatten()  # 0, rope / 2, 1, rope / 2 + 1, ...
    order = torch.cat([order, torch.arange(rope, values["index_head_dim"])])
    for name, t in tensors.items():
        if "indexer.wq_b" in name:
            tensors[name] = t.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
        elif "indexer.wk." in name or "indexer.k_norm" in name:
            tensors[name] = t[order]
    tokens = draw_tokens(150)
    expected = find_log_probs(oracle, tokens)
    for interleaved in (True, False):
        config = tiny_config(indexer_rope_interleave=interleaved)
        ours = find_log_probs_of_ours(Transformer(config, assemble(config, dict(tensors)), Reference()), [tokens])
        assert ((ours - expected).abs().max() < 1e-4) == interleaved


@pytest.mark.parametrize("copies", [True, False], ids=["own embedding and head", "shared embedding and head"])
@pytest.mark.parametrize("changes", [{}, GLM | {"indexer_types": ["full", "full", "shared"]}], ids=["deepseek", "glm"])
def test_the_mtp_layer_equals_a_block_of_transformers(changes: dict[str, Any], copies: bool, tmp_path: Path) -> None:
    values = tiny_dict(**changes)
    oracle = MtpOracle(values, copies)
    config = ModelConfig.from_dict(values)
    model = Transformer(config, assemble(config, oracle.published(tmp_path)), Reference())
    assert model.mtp is not None
    tokens = draw_tokens(152)
    batch = full_batch([tokens[:150]])
    cache = empty_cache(config, batch)
    hidden = model.forward(batch, cache)
    expected = oracle.find_hidden(tokens[:150])
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4)
    for step in (1, 2):  # the second draft starts from the state that the first returned
        hidden, _ = model.mtp.forward(batch, torch.tensor(tokens[step : step + 150]), hidden, cache)
        expected, log_probs = oracle.step(tokens[step : step + 150], expected)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.mtp.logits(hidden).log_softmax(-1), log_probs, rtol=0, atol=1e-4)


# One model, whatever the batch.


@pytest.fixture(scope="module", params=["deepseek", "glm"])
def model(request: pytest.FixtureRequest) -> Transformer:
    glm = GLM | {"num_hidden_layers": 5, "indexer_types": SHARED}
    config = tiny_config(**(glm if request.param == "glm" else yarn(mscale=1.0, mscale_all_dim=1.0)))
    return Transformer(config, assemble(config, tiny_tensors(config)), Reference())


LENGTHS = [150, 70, 100]
PROMPTS = [draw_tokens(n, seed) for seed, n in enumerate(LENGTHS)]


def run_schedule(model: Transformer, schedule: list[list[tuple[int, int]]], padding: int = 0) -> list[Tensor]:
    """Run steps of (request, how many more tokens) pieces; the log-probabilities of each request."""
    table = page_table(LENGTHS)
    cache = allocate_cache(model.config, int(table.max()) + 1, "float32", "cpu", mtp=False)
    done = [0] * len(LENGTHS)
    found: list[list[Tensor]] = [[] for _ in LENGTHS]
    for step in schedule:
        chunks = [(r, PROMPTS[r][done[r] : done[r] + n], done[r]) for r, n in step]
        log_probs = model.logits(model.forward(step_batch(chunks, table, padding), cache)).log_softmax(-1)
        for (r, n), part in zip(step, log_probs.split([n for _, n in step] + [padding] * (padding > 0)), strict=False):
            found[r].append(part)
            done[r] += n
    return [torch.cat(parts) if parts else torch.empty(0) for parts in found]


SCHEDULES = {
    "one prefill": [[(0, 150)]],
    "chunks": [[(0, n)] for n in (17, 1, 64, 30, 38)],
    "token by token": [[(1, 1)]] * 70,
    "with others, whole": [[(1, 70), (0, 150), (2, 100)]],
    "prefill chunks among decodes": [
        [(1, 60), (0, 40)], [(0, 50), (1, 1), (2, 30)], *[[(1, 1), (2, 2), (0, 9)]] * 6, [(2, 1), (0, 1), (1, 1)],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("padding", [0, 5])
def test_a_sequence_has_one_distribution_in_any_schedule(model: Transformer, name: str, padding: int) -> None:
    found = run_schedule(model, SCHEDULES[name], padding)
    for prompt, log_probs in zip(PROMPTS, found, strict=True):
        if len(log_probs):
            alone = find_log_probs_of_ours(model, [prompt])[: len(log_probs)]
            torch.testing.assert_close(log_probs, alone, rtol=0, atol=1e-4)
            assert log_probs.argmax(-1).equal(alone.argmax(-1))


def test_rows_past_a_request_are_never_read(model: Transformer) -> None:
    """Rollback is going on from an earlier position: what a rejected draft left in the cache does not show."""
    table = page_table(LENGTHS)
    cache = allocate_cache(model.config, int(table.max()) + 1, "float32", "cpu", mtp=False)
    model.forward(step_batch([(0, draw_tokens(150, 9), 0)], table), cache)  # another sequence
    model.forward(step_batch([(0, PROMPTS[0][:100], 0)], table), cache)
    hidden = model.forward(step_batch([(0, PROMPTS[0][100:], 100)], table), cache)
    expected = find_log_probs_of_ours(model, [PROMPTS[0]])[100:]
    torch.testing.assert_close(model.logits(hidden).log_softmax(-1), expected, rtol=0, atol=1e-4)


def test_captured_selections_say_where_each_token_looked(model: Transformer) -> None:
    batch = full_batch([PROMPTS[0]])
    capture: list[Tensor] = []
    model.forward(batch, empty_cache(model.config, batch), capture)
    config = model.config
    assert len(capture) == config.num_hidden_layers
    for layer, selection in enumerate(capture):
        assert selection.shape == (150, config.index_topk) and selection.dtype == torch.int32
        if not config.has_indexer(layer):
            assert selection.equal(capture[layer - 1])
        for position, row in enumerate(selection.tolist()):
            seen = [s for s in row if s >= 0]
            assert seen == sorted(set(seen)) and row == seen + [-1] * (config.index_topk - len(seen))
            assert len(seen) == min(position + 1, config.index_topk) and seen[-1] <= position
    assert not capture[0].equal(capture[2])


def test_within_index_topk_everything_is_seen_and_keys_are_still_written() -> None:
    config = tiny_config(index_topk=PAGE)
    model = Transformer(config, assemble(config, tiny_tensors(config)), Reference())
    batch = full_batch([draw_tokens(50)])
    cache = empty_cache(config, batch)
    capture: list[Tensor] = []
    model.forward(batch, cache, capture)
    assert all(row.tolist() == [*range(p + 1)] + [-1] * (PAGE - p - 1) for p, row in enumerate(capture[0]))
    assert all(bool(k.data[batch.slots].abs().sum(1).all()) for k in cache.index_keys[:3] if k is not None)


def test_an_mtp_step_uses_the_selection_it_is_given(model: Transformer) -> None:
    mtp, batch = model.mtp, full_batch([PROMPTS[0]])
    assert mtp is not None
    next_tokens = torch.tensor(PROMPTS[0][1:] + [5])
    cache = empty_cache(model.config, batch)
    hidden = model.forward(batch, cache)
    own, selection = mtp.forward(batch, next_tokens, hidden, cache)
    keys = cache.index_keys[-1]
    assert keys is not None
    keys.data.zero_()
    again, same = mtp.forward(batch, next_tokens, hidden, cache, selection)
    assert same is selection and again.equal(own)
    assert not keys.data.any()
    other, _ = mtp.forward(batch, next_tokens, hidden, cache, selection[:, :4])
    assert not other.allclose(own)


# The product's own precision, and the cache.


@pytest.mark.parametrize("fp8", [False, True])
def test_auto_precision_stays_near_float32(fp8: bool) -> None:
    """The same weights on both sides; dense, and with room for everything, so that no close choice can flip."""
    config = tiny_config(first_k_dense_replace=3, index_topk=192)
    tensors = {n: t.bfloat16().float() if t.ndim > 1 else t for n, t in tiny_tensors(config).items()}
    tokens = draw_tokens(150)
    model, exact = (
        Transformer(config, assemble(config, tensors, dtype, fp8), Reference()) for dtype in ("auto", "float32")
    )
    batch = full_batch([tokens])
    hidden = model.forward(batch, empty_cache(config, batch, "auto"))
    difference = (model.logits(hidden).log_softmax(-1) - find_log_probs_of_ours(exact, [tokens])).abs()
    assert difference.median() < 5e-3 and difference.max() < 5e-2  # measured: 0.0024 and 0.026


@pytest.mark.parametrize(("dtype", "mtp"), [("auto", True), ("float32", False)])
@pytest.mark.parametrize("index_cache", ["bf16", "fp8"])
@pytest.mark.parametrize("latent_cache", ["bf16", "fp8"])
def test_page_bytes_are_what_allocate_takes(dtype: str, mtp: bool, index_cache: str, latent_cache: str) -> None:
    config = tiny_config(**GLM, num_hidden_layers=5, indexer_types=SHARED)
    cache = allocate_cache(config, 7, dtype, "cpu", mtp, index_cache, latent_cache=latent_cache)
    keys = [k for k in cache.index_keys if k is not None]
    scales = [k.scales for k in keys if k.scales is not None]
    latents = [p for latent in cache.latent for p in latent if p is not None]
    pools = [*latents, *(k.data for k in keys), *scales]
    assert sum(p.nbytes for p in pools) == 7 * count_page_bytes(config, dtype, mtp, index_cache, latent_cache)
    assert [k is not None for k in cache.index_keys] == [True, False, True, False, False] + [True] * mtp
    number = torch.bfloat16 if dtype == "auto" else torch.float32
    is_fp8 = index_cache == "fp8"
    codes = {torch.float8_e4m3fn, torch.float32} if latent_cache == "fp8" else set()
    assert {p.dtype for p in latents} == {number} | codes and {p.numbers for p in cache.latent} == {number}
    assert {p.width for p in cache.latent} == {config.kv_lora_rank + config.qk_rope_head_dim}
    assert {k.data.dtype for k in keys} == {torch.float8_e4m3fn if is_fp8 else number}
    assert len(scales) == len(keys) * is_fp8
    assert all(s.dtype == torch.float32 and len(s) == 7 * PAGE for s in scales)
