"""What a step hands to the model: its tokens (Batch), their pools and states (Cache), what all layers share (Step).

Values only. Who fills them is the engine's business. Next: interface.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from saccade.kernels.types import IndexKeys, Latents, Rotation, Selection


@dataclass
class Batch:
    """The tokens of one step, of any mix of requests, prefill chunks and decodes.

    T tokens, R requests, P pages a request, L rows whose logits are wanted; all four may be padded to a bucket, so
    that a step has few distinct shapes. A request's tokens are consecutive, and in order of position.
    Causality comes from `positions` alone: a token sees the positions of its own request up to its own.
    """

    tokens: Tensor  # i64 [T]   token ids; padding: 0
    positions: Tensor  # i64 [T]   position in the request; padding: 0
    slots: Tensor  # i64 [T]   where the token's cache rows go, page * 64 + offset; padding: -1
    request: Tensor  # i64 [T]   row of page_table; padding: 0
    page_table: Tensor  # i64 [R, P] page ids in logical order; padding: 0 (page 0 is never given to a request)
    seq_lens: Tensor  # i64 [R]   tokens in the cache after this step; padding: 0
    query_start: Tensor  # i64 [R+1] first token of each request; padding: the number of tokens
    logit_rows: Tensor  # i64 [L]   rows of the hidden state whose logits are wanted; padding: 0
    # i64 [R]   each request's place in the states; padding: 0, which is given to no request. None: there are no states.
    # A state is before the request's first token of the step, and shall be behind its last; a token is padding where
    # its slot is -1.
    state_slots: Tensor | None = None
    # Whether inputs of products are rounded as the operations' `activations` says: tokens of long prompts. A step is of
    # one kind, so that what a token meets does not depend on who else is served.
    rounds: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Cache:
    """Paged pools. Item i of each tuple is layer i's; the last is the MTP layer's, if there is one."""

    latent: tuple[Latents, ...]
    index_keys: tuple[IndexKeys | None, ...]  # None where the layer has no index keys of its own
    states: tuple[Mapping[str, Tensor], ...] = ()  # by name, [requests + 1, ...]; () where no layer has any


class Step(NamedTuple):
    """What all layers of a step have in common."""

    batch: Batch
    cache: Cache
    rotation: Rotation
    everything: Selection | None  # that a token may see, where no context is longer than a selection
