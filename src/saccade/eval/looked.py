"""Which words of a prompt an answer looked at most.

One pass over prompt and answer keeps each layer's attention over its selection. What counts is that of the last layer
that attends, where the bundled model copies what it found (the layers before look at grammar), beyond the last
`index_topk` tokens: nearer ones a short window would see too. Next: probe.py, whose spy keeps the attention.
"""

from typing import NamedTuple

import torch

from saccade.api.llm import LLM
from saccade.engine.pages import allocate_cache
from saccade.errors import ConfigError
from saccade.eval.probe import chunks_of, make_spy
from saccade.kernels import PAGE
from saccade.models.dsa.config import ModelConfig
from saccade.ops.device import on


class Look(NamedTuple):
    """A token of the prompt and its share of the attention that went beyond the last `index_topk` tokens."""

    place: int
    text: str
    share: float


@torch.inference_mode()
def find_looks(llm: LLM, prompt: list[int], answer: list[int], most: int = 8) -> list[Look]:
    """The `most` tokens of the prompt that the answer's tokens attended to most, the first of them first.

    Attention is the last layer's, the mean over heads, summed over the tokens that wrote the answer. Empty if nothing
    lay far enough back. ConfigError for a model without such selections.
    """
    if not isinstance(llm.config, ModelConfig):
        raise ConfigError(f"model_type {llm.config.model_type}: what an answer looked at is not known of this family")
    tokens, device = prompt + answer, llm.settings.device
    total = torch.zeros(len(tokens), device=device)
    pages = -(-len(tokens) // PAGE) + 1
    s = llm.settings
    cache = allocate_cache(llm.config, pages, s.dtype, device, False, s.index_cache, 1, latent_cache=s.latent_cache)
    spy = make_spy(llm.config.model_type, llm.settings.activations)
    model = llm.model.with_ops(spy)
    with on(device):
        for batch in chunks_of(tokens[:-1], device, len(prompt)):
            spy.attention.clear()
            selections: list[torch.Tensor] = []
            model.forward(batch, cache, selections)
            wrote = batch.positions >= len(prompt) - 1
            chosen, attention = selections[-1][wrote].long(), spy.attention[-1][wrote]
            is_far = (chosen >= 0) & (batch.positions[wrote][:, None] - chosen > llm.config.index_topk)
            total.index_add_(0, chosen.clamp(min=0).flatten(), (attention * is_far).flatten())
    shares = (total[: len(prompt)] / total.sum().clamp(min=1e-9)).tolist()
    looks = [Look(place, llm.decode([prompt[place]]), share) for place, share in enumerate(shares) if share > 0]
    words = [look for look in looks if look.text.strip()]  # neither spaces nor what marks the begin
    return sorted(words, key=lambda look: -look.share)[:most]
