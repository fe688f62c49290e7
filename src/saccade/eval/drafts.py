"""How often the MTP layer's draft is the token that the main model then writes. Next: models/dsa/mtp.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.config.file import Config
from saccade.engine.pages import allocate_cache
from saccade.engine.speculate import Drafter
from saccade.eval.probe import chunks_of
from saccade.kernels import PAGE
from saccade.ops.device import on


class Drafts(NamedTuple):
    """Places of answers, and at how many of them the draft was right."""

    places: str  # which
    tokens: int
    accepted: int

    @property
    def share(self) -> float:
        return self.accepted / max(self.tokens, 1)


@torch.inference_mode()
def find_accepted(
    drafter: Drafter, config: Config, tokens: Sequence[int], dtype: str, device: str, index_cache: str = "bf16",
    latent_cache: str = "bf16", prompt: int = 0,
) -> Tensor:  # fmt: skip
    """bool [n - 2]: whether the draft for token i + 2, made from the state at i and token i + 1, is that token. The
    first `prompt` tokens are a request's prompt.

    One pass over all tokens: the first draft step of every place, as `speculate=1` would make it.
    """
    model, layer = drafter.model, drafter.layer
    pages = -(-len(tokens) // PAGE) + 1
    cache = allocate_cache(config, pages, dtype, device, True, index_cache, 1, latent_cache=latent_cache)
    found = []
    with on(device):
        for batch in chunks_of(tokens[:-2], device, prompt):
            hidden = model.forward(batch, cache)
            ahead = batch.positions.cpu() + 1
            following = torch.tensor(tokens)[ahead].to(device)
            state, _ = layer.forward(batch, following, hidden, cache)
            found.append(layer.logits(state).argmax(1).cpu() == torch.tensor(tokens)[ahead + 1])
    return torch.cat(found)


def count_drafts(accepted: Tensor, places: Sequence[int], name: str) -> Drafts:
    """Of the tokens at these places, counted from the start of the prompt."""
    right = [bool(accepted[place - 2]) for place in places]
    return Drafts(name, len(right), sum(right))


def find_told(pieces: Sequence[str]) -> range:
    """Where in an answer, given as the text of each token, its result stands first; what follows the last `####` is the
    result. Empty if it stands nowhere before."""
    marks = [i for i, piece in enumerate(pieces) if "#" in piece]
    if not marks:
        return range(0)
    result = [piece for piece in pieces[marks[-1] + 1 :] if piece.strip()]
    before = range(marks[0] - len(result) + 1)
    first = next((i for i in before if result and list(pieces[i : i + len(result)]) == result), None)
    return range(0) if first is None else range(first, first + len(result))
