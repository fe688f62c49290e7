"""What people do with GLM-5.3-Flash besides generating: pushes of weights, eval, chats. It works, or is refused by name."""

from pathlib import Path

import pytest
from announcements import announce
from byte_tokenizer import build_encoder
from flash_models import add_mtp, write_flash
from safetensors.torch import load_file

from saccade import LLM, SamplingParams
from saccade.errors import RequestError
from saccade.eval.evaluate import evaluate
from saccade.eval.looked import find_looks

PROMPT = [3 + i * 5 % 80 for i in range(40)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes, with a tokenizer, a chat template and an MTP layer."""
    folder = tmp_path_factory.mktemp("flash")
    write_flash(folder, vocab_size=320)
    add_mtp(folder)
    build_encoder().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def test_a_push_of_weights_gives_what_they_give_from_a_fresh_start(root: Path, tmp_path: Path) -> None:
    """With a vision tower in it, which is passed over."""
    write_flash(tmp_path, seed=5, vocab_size=320)
    add_mtp(tmp_path, seed=6)
    tensors = load_file(tmp_path / "model.safetensors")
    llm = LLM(root, dtype="float32", speculate=2)
    before, expected = (
        x.generate([PROMPT], GREEDY)[0].token_ids for x in (llm, LLM(tmp_path, dtype="float32", speculate=2))
    )
    with llm.push(announce(tensors)) as push:
        for name, tensor in tensors.items():
            push.feed(name, tensor)
        push.finish()
    assert llm.generate([PROMPT], GREEDY)[0].token_ids == expected != before


def test_eval_asks_and_drafts_and_refuses_the_arrangements_of_another_indexer(root: Path) -> None:
    report = evaluate(root, 1, 64, dtype="float32", asked=["words"])
    assert report.probed == 0 and report.arrangements == [] and sum(d.tokens for d in report.drafts) > 0
    with pytest.raises(RequestError, match="arrangements are those of DeepSeek Sparse Attention's indexer; expected 0"):
        evaluate(root, 1, 64, probed=1, dtype="float32", asked=["words"])


def test_what_an_answer_looked_at_is_that_of_the_last_layer_that_attends(root: Path) -> None:
    """Tokens farther back than `index_topk`, 16, the most attended first."""
    prompt = [(7 * i) % 90 for i in range(60)]
    looks = find_looks(LLM(root, dtype="float32"), prompt, PROMPT[:4], most=60)
    assert looks and all(0 <= look.place < 60 - 16 + 4 and look.share > 0 for look in looks)
    assert [look.share for look in looks] == sorted((look.share for look in looks), reverse=True)


def test_a_chat_with_an_image_is_refused_by_name(root: Path) -> None:
    llm, image = LLM(root, dtype="float32"), {"type": "image_url", "image_url": {"url": "data:"}}
    text = {"type": "text", "text": "What is it?"}
    assert llm.chat([{"role": "user", "content": [text]}], params=SamplingParams(max_tokens=2))
    with pytest.raises(
        RequestError, match="message 0: expected parts of text, found 'image_url'; the model reads text"
    ):
        llm.chat([{"role": "user", "content": [text, image]}])
