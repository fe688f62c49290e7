"""What the bundled model selects and attends to while it writes the words of a fact: intact, broken, with FP8 keys.

Each way starts from the same beginning of the answer, so that rows of the pictures are about the same words. Next:
picture.py, which draws this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from saccade.api.llm import LLM
from saccade.checkpoint.open import open_model
from saccade.compare.scoring import join_rows
from saccade.engine.pages import allocate_cache
from saccade.engine.params import SamplingParams
from saccade.eval.indexers import read_projections
from saccade.eval.probe import chunks_of, make_spy
from saccade.eval.tasks import TaskQuestion
from saccade.kernels import PAGE
from saccade.models.dsa.config import ModelConfig
from saccade.models.dsa.transformer import Transformer

ANSWERED = 32  # tokens of an answer, at most


class LayerRead(NamedTuple):
    """What one layer read when a word was chosen."""

    places: list[int]  # the selection
    shares: list[float]  # of its attention, the mean over heads


class WordRead(NamedTuple):
    """A word of the answer, and what each layer read when it was chosen."""

    word: str
    layers: list[LayerRead]


class FactRead(NamedTuple):
    """One way to answer the question."""

    tokens: list[str]  # prompt and answer, as text
    fact: range  # the places of its tokens
    question: int  # where it begins
    prompt: int  # tokens of it
    words: list[WordRead]
    begin: str  # of the answer, which it was given
    answer: str  # what it writes if it is given nothing
    is_right: bool  # both
    selections: list[torch.Tensor]  # by layer, i32 [positions, index_topk]


def read_fact(llm: LLM, asked: TaskQuestion) -> FactRead:
    """The answer of `llm`, and its words behind the fact's beginning, read one by one."""
    prompt = llm.encode(asked.prompt)
    told = asked.answer.split("\n")[1]  # the fact as a sentence
    begin = told[: told.index(asked.result)].rstrip()
    forced = [*prompt, *encode_more(llm, "\n" + begin)]
    words = len(encode_more(llm, " " + asked.result))
    greedy = SamplingParams(temperature=0.0, max_tokens=words)
    free = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=ANSWERED))[0].text or ""
    chosen = llm.generate([forced], greedy)[0].token_ids
    tokens = forced + chosen
    reads, selections = spy_on(llm, tokens, len(forced) - 1)
    spelled = [llm.decode([token]) for token in tokens]
    fact = find_run(tokens, encode_more(llm, told.removeprefix("The")))  # which may stand behind "Today the"
    question = max(i for i in range(len(prompt) - 1) if spelled[i].strip() == ".") + 1
    shown = [WordRead(spelled[len(forced) + i].strip(), layers) for i, layers in enumerate(reads)]
    is_right = free == asked.answer and llm.decode(chosen).strip() == asked.result
    return FactRead(spelled, fact, question, len(prompt), shown, begin, free.strip(), is_right, selections)


def encode_more(llm: LLM, text: str) -> list[int]:
    """The tokens of a text that goes on from another one: without what marks the begin of a prompt."""
    tokens = llm.encode(text)
    return tokens[1:] if tokens[0] == llm.config.bos_token_id else tokens


def find_run(tokens: Sequence[int], run: Sequence[int]) -> range:
    """Where `run` stands in `tokens` for the first time, with the token before it."""
    first = next(i for i in range(len(tokens)) if list(tokens[i : i + len(run)]) == list(run))
    return range(first - 1, first + len(run))


@torch.inference_mode()
def spy_on(llm: LLM, tokens: Sequence[int], first: int) -> tuple[list[list[LayerRead]], list[torch.Tensor]]:
    """Of each token from `first` on but the last, what each layer read when the next one was chosen; and the
    selections of all."""
    pages = -(-len(tokens) // PAGE) + 1
    s, spy = llm.settings, make_spy(llm.config.model_type, llm.settings.activations)
    assert isinstance(llm.config, ModelConfig) and isinstance(llm.model, Transformer)
    cache = allocate_cache(llm.config, pages, s.dtype, s.device, False, s.index_cache, latent_cache=s.latent_cache)
    model, rows, kept = llm.model.with_ops(spy), list[list[LayerRead]](), list[list[torch.Tensor]]()
    for batch in chunks_of(tokens[:-1], s.device):
        spy.attention.clear()
        selections: list[torch.Tensor] = []
        model.forward(batch, cache, selections)
        kept.append(selections)
        for row in (batch.positions >= first).nonzero()[:, 0].tolist():
            pairs = zip(selections, spy.attention, strict=True)
            rows.append([LayerRead(chosen[row].tolist(), shares[row].tolist()) for chosen, shares in pairs])
    return rows, [join_rows(parts) for parts in zip(*kept, strict=True)]


def lose_scales(llm: LLM) -> None:
    """The fault of several loaders: the FP8 codes of each `wk` are taken as numbers, without their scales."""
    config, index = open_model(llm.settings.path)
    assert isinstance(config, ModelConfig) and isinstance(llm.model, Transformer)
    projections, _ = read_projections(config, index, llm.settings.device)
    for layer, projection in projections.items():
        indexer = llm.model.layers[layer].attention.indexer
        assert indexer is not None
        wk = projection.wk.data.float()
        indexer.projection.matrix.data[: len(wk)].copy_(wk)


def count_kept(before: FactRead, after: FactRead) -> list[float]:
    """By layer, the share of what `before` selects that `after` selects too, over all tokens that have to choose."""
    shares = []
    for ours, theirs in zip(before.selections, after.selections, strict=True):
        width, rows = ours.shape[1], min(len(ours), len(theirs))
        chosen, others = ours[width:rows], theirs[width:rows]
        shares.append(float((chosen[:, :, None] == others[:, None, :]).any(2).float().mean()))
    return shares
