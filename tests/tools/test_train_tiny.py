"""The trainer of the bundled model: its arithmetic is the engine's, its texts are what they claim, its state resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import empty_cache, full_batch
from torch import Tensor

from saccade.checkpoint.index import read_index
from saccade.checkpoint.write import quantize_blocks
from saccade.eval import wording
from saccade.kernels.reference import dequantize
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference
from saccade.plan import check, make_plan
from saccade.weights.loader import load
from tools.train_tiny import data, vocabulary
from tools.train_tiny.config import CONFIG, TOKEN_ONLY
from tools.train_tiny.data import Shape
from tools.train_tiny.examples import ANSWER, TEXT, make_example
from tools.train_tiny.export import publish, rescale, write_model
from tools.train_tiny.losses import Group, Mode, find_losses
from tools.train_tiny.model import head, run_main, run_mtp
from tools.train_tiny.train import Phase, Trainer, save_pieces
from tools.train_tiny.weights import draw_weights, list_shapes, prepare, round_to_fp8, stack_experts, unstack_experts

SMALL = CONFIG | {
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 96, "moe_intermediate_size": 48,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16, "v_head_dim": 20, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 16,
}  # fmt: skip
TINY = SMALL | {"hidden_size": 64}


def random_weights(c: ModelConfig) -> dict[str, Tensor]:
    """Nothing is zero or one, so that nothing can be left out unnoticed; what is published as BF16 is BF16."""
    dice = torch.Generator().manual_seed(3)
    weights = draw_weights(c, 3)
    for w in weights.values():
        w += 0.3 * torch.randn(w.shape, generator=dice) * (w.shape[-1] ** -0.5 if w.ndim > 1 else 1)
    return {name: w.float() for name, w in prepare(weights, torch.bfloat16, fp8=True).items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig, dict[str, Tensor]]:
    folder, c = tmp_path_factory.mktemp("exported"), ModelConfig.from_dict(SMALL)
    c = replace(c, latent_norm_eps=0.01)  # so large that a trainer with another one shows
    weights = random_weights(c)
    write_model(folder, SMALL, weights)
    return folder, c, weights


def test_the_trainers_logits_are_the_engines_beyond_index_topk(
    exported: tuple[Path, ModelConfig, dict[str, Tensor]],
) -> None:
    folder, c, weights = exported
    plan = make_plan(c, read_index(folder), dtype="float32")
    assert not check(plan)
    loaded = load(plan)
    engine = Transformer(c, loaded, Reference())
    loaded.finish()
    assert engine.mtp is not None
    tokens = torch.randint(c.vocab_size, (2, 90), generator=torch.Generator().manual_seed(1))
    batch = full_batch([row.tolist() for row in tokens])
    cache = empty_cache(c, batch)
    hidden = engine.forward(batch, cache)
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    drafts, _ = engine.mtp.forward(batch, following.flatten(), hidden, cache)

    ours, _ = run_main(weights, c, tokens, sparse=True)
    assert torch.allclose(head(weights, ours).flatten(0, 1), engine.logits(hidden), atol=2e-4)
    our_drafts, _ = run_mtp(weights, c, following, ours, sparse=True)
    assert torch.allclose(head(weights, our_drafts).flatten(0, 1), engine.mtp.logits(drafts), atol=2e-4)
    dense, _ = run_main(weights, c, tokens, sparse=False)
    assert (dense - ours)[:, 16:].abs().max() > 0.05  # the selection matters, or this test would prove little


def test_rescaling_leaves_the_function_bit_for_bit_and_spreads_the_scales_of_every_wk(
    exported: tuple[Path, ModelConfig, dict[str, Tensor]],
) -> None:
    _, c, weights = exported
    rescaled = rescale(c, weights)
    tokens = torch.randint(c.vocab_size, (1, 60), generator=torch.Generator().manual_seed(2))
    for sparse in (False, True):
        before, _ = run_main(weights, c, tokens, sparse)
        after, _ = run_main(rescaled, c, tokens, sparse)
        assert torch.equal(before, after)
        assert torch.equal(
            run_mtp(weights, c, tokens, before, sparse)[0], run_mtp(rescaled, c, tokens, before, sparse)[0]
        )
    stored = dict(publish(c, weights))
    for layer in range(c.num_hidden_layers + 1):
        scale = stored[f"model.layers.{layer}.self_attn.indexer.wk.weight_scale_inv"]
        assert scale.shape[1] >= 4 and scale.max() / scale.min() >= 2**6
        assert torch.equal(scale.log2(), scale.log2().round())


def test_the_export_is_the_published_layout_with_pairs_in_different_files(
    exported: tuple[Path, ModelConfig, dict[str, Tensor]],
) -> None:
    folder, c, weights = exported
    entries = read_index(folder).entries
    plain = {name: shape for name, shape in list_shapes(c).items() if name in entries}
    assert plain == list_shapes(c)
    assert {n: tuple(t.shape) for n, t in unstack_experts(weights)} == plain
    wk = entries["model.layers.3.self_attn.indexer.wk.weight"]
    scale = entries["model.layers.3.self_attn.indexer.wk.weight_scale_inv"]
    assert (wk.dtype, scale.dtype) == ("F8_E4M3", "F32") and wk.file != scale.file
    assert entries["model.layers.3.eh_proj.weight"].dtype == "BF16"
    assert entries["model.layers.0.input_layernorm.weight"].dtype == "BF16"
    assert entries["model.layers.0.self_attn.indexer.k_norm.bias"].dtype == "F32"


def test_experts_survive_stacking() -> None:
    c = ModelConfig.from_dict(TINY)
    weights = draw_weights(c, 1)
    again = stack_experts(c, dict(unstack_experts(weights)))
    assert again.keys() == weights.keys() and all(torch.equal(again[n], weights[n]) for n in weights)


def test_training_rounds_to_the_numbers_that_the_writer_stores() -> None:
    w = torch.randn(2, 320, 200, generator=torch.Generator().manual_seed(0))
    w[0, :128, :128] *= 448 * 0.125 / w[0, :128, :128].abs().max()  # a scale that is a power of two already
    w[1, 128:256, 128:] = 0
    for matrix, rounded in zip(w, round_to_fp8(w), strict=True):
        codes, scale = quantize_blocks(matrix)
        assert torch.equal(dequantize(codes, scale, (128, 128)), rounded)


def test_the_tokenizer_gives_every_text_back_and_numbers_are_one_token() -> None:
    tokenizer = vocabulary.build_tokenizer()
    texts = ["Tom has 12 apples.\n12 + 7 = 19\n#### 19", " héllo  wörld 1234 200\t\r\n 🙂's !?", "", "a\x00b", "<|end|"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == [vocabulary.BEGIN_ID, *vocabulary.encode(text)]
        assert tokenizer.decode(ids) == text
    for number in range(200):
        assert len(vocabulary.encode(str(number))) == 1
    assert max(tokenizer.get_vocab().values()) < vocabulary.SIZE
    for name in wording.NAMES:
        assert len(vocabulary.encode(f"{name} {name}")) == 2


def test_an_examples_tokens_say_what_they_are() -> None:
    tokenizer = vocabulary.build_tokenizer()
    for task, length in (("words", 0), ("recall", 512), ("story", 512), ("both", 512)):
        example = make_example("train", 3, 5, task, length)
        assert len(example.tokens) == len(example.kinds) <= (length or data.SHORT)
        assert example.tokens[0] == vocabulary.BEGIN_ID and example.tokens[-1] == vocabulary.END_ID
        assert tokenizer.decode([example.tokens[example.prompt]]) == "\n" and example.kinds[example.prompt] == ANSWER
        first = example.kinds.index(ANSWER)
        assert tokenizer.decode([example.tokens[first - 1]]) == "?" and example.kinds[1] == TEXT
        ends = [place for place, token in enumerate(example.tokens) if token == vocabulary.END_ID]
        assert all(example.kinds[place] == ANSWER for place in ends) and (len(ends) > 1) == (task != "words")
        text = [token for token, kind in zip(example.tokens, example.kinds, strict=True) if kind == TEXT]
        assert "####" not in tokenizer.decode(text)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    shape = Shape(8, 5, 256, sums=0.5)
    once, again, other = (data.make_batch(1, step, shape) for step in (7, 7, 8))
    assert all((a.tokens == b.tokens).all() and (a.kinds == b.kinds).all() for a, b in zip(once, again, strict=True))
    assert (once[1].tokens != other[1].tokens).any() and once[0].tokens.shape == (8, 128)


PHASES = (
    Phase("dense", 3, (Shape(4, 2),), sparse=False),
    Phase(
        "FP8",
        3,
        (Shape(2, 2), Shape(long=2, length=96)),
        sparse=True,
        fp8=True,
        recycled=0.3,
        last_rate=0.01,
    ),
)


def test_no_layer_writes_where_the_tokens_stand_alone() -> None:
    c = ModelConfig.from_dict(SMALL)
    trainer = Trainer(c, (Phase("sparse", 2, (Shape(2, 1, 96),), sparse=True),), "cpu", seed=1)
    trainer.run()
    writers = [
        w for name, w in trainer.weights.items() if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
    ]
    assert len(writers) == 4 + 3 * 2 + 1  # attention; shared and routed experts; the dense layer
    for w in writers:
        assert w[..., TOKEN_ONLY:, :].abs().max() == 0 and w[..., :TOKEN_ONLY, :].abs().max() > 0


def test_training_lowers_the_loss_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def begin() -> Trainer:
        return Trainer(ModelConfig.from_dict(TINY), PHASES, "cpu", seed=5)

    def find_loss(trainer: Trainer) -> float:
        """Of the word problems of the first batch."""
        rows = data.make_batch(5, 0, PHASES[0].shapes[0])[0]
        tokens, kinds = (torch.from_numpy(a).long() for a in rows[1:])
        group = Group(tokens, kinds, torch.full((2, *tokens.shape), 0.5))
        with torch.no_grad():
            return float(find_losses(trainer.weights, trainer.c, group, Mode(False)).parts["lm"])

    straight = begin()
    untrained = find_loss(straight)
    for step in range(6):
        straight.train(data.make_batch(5, step, PHASES[step // 3].shapes[step % 3 % (step // 3 + 1)]))
    assert find_loss(straight) < untrained - 0.01

    first = begin()
    first.run(seconds=0)  # one step, then the time is over
    first.save(tmp_path)
    second = begin()
    second.restore(tmp_path)
    assert second.step == 1
    second.run()
    assert second.step == 6
    assert all(torch.equal(w, second.weights[name]) for name, w in straight.weights.items())
    assert all(torch.equal(t, second.optimizer.state[name]) for name, t in straight.optimizer.state.items())
    bias = straight.weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0

    writer = straight.weights["model.layers.0.self_attn.o_proj.weight"]
    assert writer.shape[0] <= TOKEN_ONLY and writer.abs().max() > 0

    save_pieces(straight.weights, tmp_path)
    assert {p.name for p in tmp_path.glob("weights-*")} == {"weights-0.safetensors"}
