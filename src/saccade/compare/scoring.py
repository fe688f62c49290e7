"""Log-probabilities and selections of tokens, teacher-forced in one variant of the model. Next: variants/table.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.compare.variants.table import Variant
from saccade.engine.pages import allocate_cache
from saccade.eval.probe import chunks_of
from saccade.kernels import PAGE
from saccade.kernels.types import Selection
from saccade.models.dsa.transformer import Transformer
from saccade.ops.device import on


class Forced(NamedTuple):
    """What one variant says of n tokens."""

    logprobs: Tensor  # f32 [n - 1]: of each token but the first, given those before it
    selections: list[Tensor]  # by layer, i32 [n - 1, K]: what was seen when each of them was chosen, -1 padded


class ScoredText(NamedTuple):
    """A text that both sides have scored."""

    name: str
    tokens: list[int]  # prompt and answer
    prompt: int  # tokens of it
    theirs: Tensor  # f32 [compared]: log-probabilities of the last so many tokens
    exact: Forced

    @property
    def first(self) -> int:
        """The place of the first token that is compared."""
        return len(self.tokens) - len(self.theirs)

    def part(self, logprobs: Tensor) -> Tensor:
        """Of n - 1 log-probabilities those that are compared."""
        return logprobs[self.first - 1 :]

    def leave(self, said: Forced) -> Tensor:
        """What a variant that says this leaves unexplained."""
        return self.theirs - self.part(said.logprobs)


@torch.inference_mode()
def force(model: Transformer, variant: Variant, tokens: Sequence[int], device: str) -> Forced:
    """One pass over `tokens`. Both results are on the host."""
    pages = -(-len(tokens) // PAGE) + 1
    cache = allocate_cache(model.config, pages, variant.cache_dtype, device, False)
    changed, found, seen = model.with_ops(variant.make()), list[Tensor](), list[list[Tensor]]()
    with on(device):
        for batch in chunks_of(tokens[:-1], device):
            first = int(batch.positions[0])
            targets = torch.tensor(tokens[first + 1 : first + 1 + len(batch.tokens)], device=device)
            selections: list[Selection] = []
            logits = changed.logits(changed.forward(batch, cache, selections))
            found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu())
            seen.append([selection.cpu() for selection in selections])
    return Forced(torch.cat(found), [join_rows(parts) for parts in zip(*seen, strict=True)])


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Selections of consecutive tokens, padded to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])
