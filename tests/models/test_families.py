"""A family from outside the package: planned, proven, loaded, run, preempted; nothing outside its folder knows it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from small_checkpoints import decode, write_small
from torch import Tensor
from toy_family import TOY
from toy_family.config import ToyConfig, read_config
from toy_family.operations import ToyReference

from saccade.api.llm import LLM
from saccade.api.settings.resolve import require_family
from saccade.checkpoint.open import open_model
from saccade.checkpoint.write import quantize_blocks
from saccade.engine.params import SamplingParams
from saccade.errors import ConfigError, NumericsError, PlanError
from saccade.eval.looked import find_looks
from saccade.models.registry import DSA, FLASH, find_cache_rows, find_family, register
from saccade.plan import Layout, make_plan
from saccade.weights.loader import load

VALUES: dict[str, Any] = {
    "model_type": "toy_dsa", "vocab_size": 96, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 16, "sum_dim": 24,
    "max_position_embeddings": 512, "layer_types": ["attention", "running_sum", "attention"], "eos_token_id": 95,
}  # fmt: skip
CONFIG = read_config(VALUES, "config.json", ())
assert isinstance(CONFIG, ToyConfig)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPTS = [[(7 * i + 11 * n) % 90 for i in range(n)] for n in (40, 9, 57)]  # longer and shorter than a selection
SCALE = "layers.0.indexer.wk.weight_scale_inv"


def make_tensors() -> dict[str, Tensor]:
    """What the toy's checkpoint holds: BF16, but for the indexer's `wk`, FP8 in blocks with a scale each."""
    dice, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for part in (part for param in TOY.parameters(CONFIG, Layout(), None) for part in param.parts):
        noise = torch.randn(part.shape, generator=dice)
        name, leaf = part.source, part.source.rpartition(".")[2]
        if leaf == "decay":
            tensors[name] = torch.rand(part.shape, generator=dice) * 0.5 + 0.4
        elif len(part.shape) == 1:
            tensors[name] = (0.7 if leaf == "read" else 1.0) + 0.3 * noise
        elif name.endswith("wk.weight"):
            noise[:, 128:] *= 2.0**-6  # a lost scale would change which tokens are selected
            tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(noise)
        else:
            tensors[name] = (noise * (1.0 if name == "embed.weight" else part.shape[1] ** -0.5)).bfloat16()
    return tensors


TENSORS = make_tensors()


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    withdraw = register(TOY)
    yield
    withdraw()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("toy") / "m", VALUES, TENSORS, lambda name: len(name) % 2)


# The same model, written down again without pages, chunks, states and operations.


def run_plainly(tokens: list[int]) -> Tensor:
    """f32 [T, vocab]"""
    c, w = CONFIG, {name.removesuffix(".weight"): decode(TENSORS, name) for name in TENSORS}
    streams = w["embed"][tokens][:, None].repeat(1, 2, 1)
    for i, kind in enumerate(c.layer_types):
        x = f"layers.{i}."
        h = norm(streams[:, 0] * w[x + "mixer.read"][0] + streams[:, 1] * w[x + "mixer.read"][1], w[x + "norm"])
        out = attend(h, w, x) if kind == "attention" else sum_up(h, w, x)
        streams = streams + torch.stack([out * w[x + "mixer.write"][0], out * w[x + "mixer.write"][1]], 1)
        h = norm(streams[:, 0] * w[x + "mlp_mixer.read"][0] + streams[:, 1] * w[x + "mlp_mixer.read"][1],
                 w[x + "mlp_norm"])  # fmt: skip
        gate, up = h @ w[x + "mlp.gate_proj"].T, h @ w[x + "mlp.up_proj"].T
        out = (gate * gate.sigmoid() * up) @ w[x + "mlp.down_proj"].T
        streams = streams + torch.stack([out * w[x + "mlp_mixer.write"][0], out * w[x + "mlp_mixer.write"][1]], 1)
    x = streams[:, 0] * w["last_mixer.read"][0] + streams[:, 1] * w["last_mixer.read"][1]
    return norm(x, w["norm"]) @ w["lm_head"].T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Rotate pair j of x [T, ..., rope] at position t by the angle t / 1000^(2 j / rope)."""
    out = x.clone()
    for j, (a, b) in enumerate(pairs):
        angle = torch.arange(len(x)) / 1000.0 ** (2 * j / (2 * len(pairs)))
        cos, sin = (f(angle).view(-1, *[1] * (x.ndim - 2)) for f in (torch.cos, torch.sin))
        out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    return out


def attend(h: Tensor, w: dict[str, Tensor], x: str) -> Tensor:
    c, a, i, t = CONFIG, x + "attention.", x + "indexer.", len(h)
    heads, rope = c.num_attention_heads, c.qk_rope_head_dim
    neighbours = [(2 * j, 2 * j + 1) for j in range(rope // 2)]
    halves = [(j, j + rope // 2) for j in range(rope // 2)]
    low, kv = norm(h @ w[a + "q_a"].T, w[a + "q_norm"]), h @ w[a + "kv_a"].T
    latent, key_rope = norm(kv[:, : c.kv_lora_rank], w[a + "kv_norm"]), turn(kv[:, c.kv_lora_rank :], neighbours)
    q = (low @ w[a + "q_b"].T).view(t, heads, -1)
    k = (latent @ w[a + "k_b"].T).view(t, heads, -1)
    v = (latent @ w[a + "v_b"].T).view(t, heads, -1)
    # Which tokens: every query head's products with the one key, gated.
    iq = turn((low @ w[i + "wq_b"].T).view(t, c.index_n_heads, -1), halves)
    ik = turn(norm(h @ w[i + "wk"].T, w[i + "k_norm"]), halves)
    share = (h @ w[i + "weights"].T) * (h @ w[i + "gate"].T).sigmoid()
    index = (torch.einsum("thd,sd->ths", iq, ik).relu() * share[:, :, None]).sum(1)
    out = torch.zeros(t, heads, c.v_head_dim)
    for n in range(t):
        order = index[n, : n + 1].sort(descending=True, stable=True).indices  # ties to the lower position
        chosen = order[: c.index_topk]
        nope = torch.einsum("hd,shd->hs", q[n, :, : c.qk_nope_head_dim], k[chosen])
        turned = turn(q[:, :, c.qk_nope_head_dim :], neighbours)[n] @ key_rope[chosen].T
        scores = (nope + turned) * (c.qk_nope_head_dim + rope) ** -0.5
        out[n] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[chosen])
    return out.flatten(1) @ w[a + "o"].T


def sum_up(h: Tensor, w: dict[str, Tensor], x: str) -> Tensor:
    y, all_of_them = torch.zeros(CONFIG.sum_dim), []
    for moved in h @ w[x + "sum.in_proj"].T:
        y = w[x + "sum.decay"] * y + moved
        all_of_them.append(y)
    return torch.stack(all_of_them) @ w[x + "sum.out_proj"].T


_answers: dict[tuple[int, ...], list[int]] = {}


def answer_plainly(prompt: list[int], count: int = GREEDY.max_tokens or 0) -> list[int]:
    known = _answers.setdefault(tuple(prompt), [])
    while len(known) < count:
        known.append(int(run_plainly(prompt + known)[-1].argmax()))
    return known[:count]


# Planned and proven.


def test_it_is_planned_by_its_own_table(path: Path, run: Run) -> None:
    """`wk`, FP8 with its scale, is upcast into one BF16 matrix with the two others."""
    plan = make_plan(*open_model(path))
    held = load(plan).held["layers.0.indexer.wk_weights_gate"]
    parts = (decode(TENSORS, f"layers.0.indexer.{name}.weight") for name in ("wk", "weights", "gate"))
    assert held.dtype == torch.bfloat16 and held.equal(torch.cat(list(parts)).bfloat16())
    assert run("check", path).code == 0
    shown = run("plan", path).out
    assert "wk (FP8 128x128 -> BF16) | weights (BF16) | gate (BF16)" in shown
    # 2 layers of 48 + 16 BF16 numbers a token; one layer of 24 F32 a request
    assert "256 B a token, latents in BF16, index keys in BF16; 96 B a request of states" in shown
    assert json.loads(run("plan", path, "--json").out)["state_bytes"] == 96
    assert SCALE in run("explain", path, "layers.0.indexer.wk_weights_gate").out


def test_a_lost_scale_is_named_before_a_byte_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != SCALE}
    lost = write_small(tmp_path / "m", VALUES, tensors)
    monkeypatch.setattr("saccade.weights.loader.read_rows", lambda *_, **__: 1 / 0)
    with pytest.raises(PlanError, match=r"missing-scale: layers\.0\.indexer\.wk\.weight"):
        LLM(lost, device="cpu")


def test_its_config_is_read_by_its_reader(tmp_path: Path) -> None:
    write_small(tmp_path / "m", VALUES | {"sum_dim": "many"}, {})
    with pytest.raises(ConfigError, match="sum_dim: "):
        open_model(tmp_path / "m")
    write_small(tmp_path / "n", VALUES | {"model_type": "toy_dsb"}, {})
    with pytest.raises(
        ConfigError, match="not implemented; supported: deepseek_v32, glm_moe_dsa, glm5_next, glm5_next_text, toy_dsa$"
    ):
        open_model(tmp_path / "n")


def test_a_model_type_has_one_family() -> None:
    with pytest.raises(ValueError, match="'toy_dsa' belongs to Toy"):
        register(TOY)
    assert find_family("glm_moe_dsa") is DSA
    with pytest.raises(ConfigError, match="belongs to no family"):
        find_family("hy_v4")


# Run.


@pytest.mark.parametrize("limit", [512, 7, 1], ids=["one step", "chunks", "tokens"])
def test_it_answers_like_the_plain_forward(path: Path, limit: int) -> None:
    """Alone; then all at once, in chunks of one another's steps."""
    llm = LLM(path, device="cpu", dtype="float32", max_batch_tokens=limit, cache_tokens=512)
    if limit > 1:
        assert llm.generate(PROMPTS[0], GREEDY)[0].token_ids == answer_plainly(PROMPTS[0])
    assert [a.token_ids for a in llm.generate(PROMPTS, GREEDY)] == [answer_plainly(p) for p in PROMPTS]


def test_more_requests_than_run_at_once(path: Path) -> None:
    """So that each place in the states is given away again and again."""
    llm = LLM(path, device="cpu", dtype="float32", max_requests=2, cache_tokens=512)
    prompts = [*PROMPTS, *reversed(PROMPTS)]
    assert [a.token_ids for a in llm.generate(prompts, GREEDY)] == [answer_plainly(p) for p in prompts]
    (state,) = (layer["sum"] for layer in llm.engine.cache.states if layer)
    assert state.shape == (3, CONFIG.sum_dim)
    layers = find_cache_rows(CONFIG, False)
    assert [layer.latent for layer in layers] == [pool.width for pool in llm.engine.cache.latent] == [48, 0, 48]
    assert llm.settings.cache_bytes == 9 * 64 * 512 + 3 * 96


def test_preempted_it_goes_on_where_it_was(path: Path) -> None:
    """Three pages for two requests, both of which want a second one."""
    llm = LLM(path, device="cpu", dtype="float32", cache_tokens=192)
    params, prompts = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), [PROMPTS[2], PROMPTS[2][1:]]
    answers = llm.generate(prompts, params)
    assert llm.engine.scheduler.preemptions > 0
    assert [a.token_ids for a in answers] == [answer_plainly(p, 12) for p in prompts]


def test_its_pages_are_not_kept(path: Path) -> None:
    """A state is in no page: what pages save would be computed all the same."""
    llm = LLM(path, device="cpu", dtype="float32")
    prompt = PROMPTS[2] * 3
    assert [llm.generate(prompt, GREEDY)[0].cached_tokens for _ in range(2)] == [0, 0]
    assert not llm.settings.prefix_cache and llm.stats.prefix is None
    assert any(note.startswith("prefix_cache:") for note in llm.settings.notes)
    with pytest.raises(ConfigError, match="prefix_cache: True"):
        LLM(path, device="cpu", prefix_cache=True)


def test_it_scores(path: Path) -> None:
    llm = LLM(path, device="cpu", dtype="float32", max_batch_tokens=16)
    tokens = PROMPTS[0]
    expected = run_plainly(tokens)[:-1].log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    assert llm.score(tokens) == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_step_that_was_cut_short_is_made_up_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C behind the layer that has a state: the state has gone on, the request has not."""
    llm = LLM(path, device="cpu", dtype="float32", max_batch_tokens=16)
    job = llm.engine.add(PROMPTS[0], GREEDY)

    def interrupt(*given: Any) -> Tensor:
        scan(*given)
        raise KeyboardInterrupt

    scan = ToyReference.scan
    for steps in (2, 3):
        for _ in range(steps):
            llm.engine.step()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ToyReference, "scan", interrupt)
            llm.engine.step()
    while llm.engine.jobs:
        llm.engine.step()
    assert job.request.generated == answer_plainly(PROMPTS[0])


def test_what_is_not_finite_is_traced_to_its_layer(path: Path) -> None:
    llm = LLM(path, device="cpu", dtype="float32", max_batch_tokens=16)
    matrix, embedding = llm._loaded.held["layers.1.sum.in_proj"], llm._loaded.held["embed"]
    right = matrix.clone()
    matrix.fill_(3e38)
    with pytest.raises(NumericsError, match=r"layers\.1\.sum is the first whose output is not finite, at position 0 "):
        llm.generate(PROMPTS[0], GREEDY)
    matrix.copy_(right)  # what the search for the cause left in a state is nobody's
    embedding[PROMPTS[0][30]].fill_(3e38)
    with pytest.raises(NumericsError, match=r"layers\.0\.mixer is the first .*, at position 30 "):
        llm.generate(PROMPTS[0], GREEDY)


def test_it_refuses_what_it_cannot_do(path: Path) -> None:
    with pytest.raises(ConfigError, match="speculate: 2 drafts .* states of Toy cannot be rolled back"):
        LLM(path, device="cpu", speculate=2)
    assert 'speculate: "auto" is 0: the states of Toy' in str(LLM(path, device="cpu", speculate="auto").settings)
    with pytest.raises(ConfigError, match='kernels: "fast": Toy has no kernels'):
        require_family(TOY, True, "fast", "fast", 0)
    assert require_family(TOY, True, "fast", "auto", 0)[0] == "reference"
    assert require_family(DSA, False, "fast", "fast", 2) == ("fast", 2, ())
    assert require_family(FLASH, True, "fast", "auto", 2) == ("fast", 2, ())
    with pytest.raises(ConfigError, match='kernels: "fast": too wide; use "auto"'):
        require_family(FLASH, True, "fast", "fast", 0, "too wide")
    kernels, _, notes = require_family(FLASH, True, "fast", "auto", 0, "too wide")
    assert kernels == "reference" and notes == ('kernels: "auto" is "reference": too wide',)
    with pytest.raises(PlanError, match="runs on one rank"):
        make_plan(*open_model(path), Layout(tp=2))
    with pytest.raises(ConfigError, match="model_type toy_dsa: what an answer looked at"):
        find_looks(LLM(path, device="cpu"), PROMPTS[0], [1, 2])
