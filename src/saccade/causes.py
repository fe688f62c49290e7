"""Why a request's numbers are not finite: the parameter that holds NaN or infinity, or the first layer that makes one.

Nobody comes here before a request has failed, so time matters little: a pass over the parameters, and, if all of them
are finite, one over the request's tokens, layer by layer. Memory does: parts of a parameter are looked at one by one,
and the pass writes into pages that are free. Knows no requests. Next: engine.py, whose step found out.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saccade.kernels.codes import read_scale
from saccade.model.transformer import Transformer

if TYPE_CHECKING:
    from saccade.batch import Batch
    from saccade.cache import Cache
    from saccade.kernels.reference import Selection

PART = 1 << 22  # numbers of a parameter that are judged at once: as f32, 16 MiB
MOST_PASSES = 8  # over tokens, until weights change: where a thousand requests fail, more would say the same


class Part(NamedTuple):
    """Tokens of the request, laid out for the model."""

    batch: "Batch"
    tokens: int  # those behind them in the batch are padding


class Causes:
    """Looks into one model. `forget` when its weights have changed."""

    def __init__(self, model: Transformer, held: Mapping[str, Tensor]):
        """`held`: the model's parameters by name, in the order of the forward pass."""
        mtp = f"model.layers.{model.config.num_hidden_layers}."  # whose drafts are guesses, and no answers
        self._model = model
        self._held = {name: tensor for name, tensor in held.items() if not name.startswith(mtp)}
        self.forget()

    def forget(self) -> None:
        self._parameter: str | None = None
        self._is_scanned, self._passes = False, 0

    def find_parameter(self) -> str | None:
        """The first parameter that is not finite, as a clause for an error; found once."""
        if not self._is_scanned:
            self._parameter = find_parameter(self._held)
            self._is_scanned = True
        return self._parameter

    def find_layer(self, parts: Iterable[Part], cache: "Cache") -> str | None:
        """The first layer that gives what is not finite, run over the request's tokens from position 0 on, as a clause;
        None if there is none. Writes the cache rows of `parts`."""
        if self._passes == MOST_PASSES:
            return None
        self._passes += 1
        for batch, count in parts:
            found = find_layer(self._model, batch, count, cache)
            if found is not None:
                return found
        return None


def find_parameter(held: Mapping[str, Tensor]) -> str | None:
    for name, tensor in held.items():
        count, first = count_bad(tensor, is_scale=name.endswith("scale"))
        if count:
            place = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
            verb = "number is" if count == 1 else "numbers are"
            return f"of parameter {name} {count:,} {verb} NaN or infinite, the first at {place} of {list(tensor.shape)}"
    return None


def count_bad(tensor: Tensor, is_scale: bool) -> tuple[int, int]:
    """How many numbers are not finite, and the place of the first, counted through. Integer codes always are; integers
    that are scales hold exponents (E8M0), one in a byte or several in a word: there the word counts."""
    if not (tensor.is_floating_point() or is_scale):
        return 0, 0
    flat, count, first = tensor.reshape(-1), 0, 0
    for start in range(0, len(flat), PART):
        bad = find_bad(flat[start : start + PART])
        found = int(bad.sum())
        if found and not count:
            first = start + int(bad.int().argmax())
        count += found
    return count, first


def find_bad(numbers: Tensor) -> Tensor:
    """bool [n], of numbers or scales [n]."""
    if numbers.dtype == torch.float8_e4m3fn:  # the one code without its sign; conversion would take 6 times as long
        return (numbers.view(torch.uint8) & 0x7F) == 0x7F
    return ~read_scale(numbers).isfinite().view(len(numbers), -1).all(1)


def find_layer(model: Transformer, batch: "Batch", count: int, cache: "Cache") -> str | None:
    """The model's forward pass over the first `count` tokens of a batch of one request, up to what is not finite."""

    def is_wrong(x: Tensor) -> bool:
        return not bool(x[:count].isfinite().all())

    def tell(what: str, x: Tensor) -> str:
        token = int((~x[:count].isfinite().all(1)).int().argmax())
        return f"{what} at position {int(batch.positions[token])} (token {int(batch.tokens[token])})"

    x = model.embed_tokens[batch.tokens].float()
    if is_wrong(x):
        return tell("the embedding is the first that is not finite,", x)
    rotation = model.rotary(batch.positions)
    selection: Selection | None = None
    for i, layer in enumerate(model.layers):
        shared = None if model.config.has_indexer(i) else selection
        seen, selection = layer.attention(layer.input_norm(x), rotation, batch, cache, shared)
        x = x + seen
        if is_wrong(x):
            return tell(f"model.layers.{i}.self_attn is the first whose output is not finite,", x)
        x = x + layer.mlp(layer.post_attention_norm(x))
        if is_wrong(x):
            return tell(f"model.layers.{i}.mlp is the first whose output is not finite,", x)
    x = model.norm(x)
    if is_wrong(x):
        return tell("model.norm is the first whose output is not finite,", x)
    if is_wrong(model.logits(x[count - 1 : count])):
        return "lm_head is the first whose output is not finite"
    return None
