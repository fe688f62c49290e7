"""The block operations that a model is written in.

Each is as large as what a GPU does in one launch or two. A model says *what* happens, once. `gpu.py` alone says with
which kernel. Models pass some values on unopened: a `Residual` may have its next norm applied already, and carries
which one, so asking for another norm is an error; queries are as far computed as the operations before could take them.
Where a rank holds a share of a parameter, operations know which from their ranks (parallel/ranks.py); models do not.
reference.py defines each operation exactly. Another implementation may round inputs of products to 16 bits, and to 8
where this file says so. Both round them further in steps that round (`Batch.rounds`), as their `activations` say.
Next: reference.py, gpu.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor

from saccade.kernels.types import CacheRows, Chosen, Latents, Matrix, Mlp, Norm, Rotation, Routing, Selection
from saccade.ops.step import Batch, Step


@dataclass(frozen=True)
class Residual:
    """The residual stream, f32 [T, hidden], as its next reader finds it. Made by operations, opaque to models."""

    value: Any  # a tensor, or whatever an implementation prepared for `norm`
    norm: Norm  # the one that is asked for next

    def prepared_for(self, norm: Norm) -> Any:
        """`value`, for a reader that applies `norm`. Raises ValueError if another one was announced."""
        if norm.weight is not self.norm.weight or norm.eps != self.norm.eps:
            sizes = f"{tuple(self.norm.weight.shape)}, eps {self.norm.eps:g}"
            raise ValueError(f"the residual was prepared for another norm ({sizes}) than the one asked for")
        return self.value


class Rotary(Protocol):
    """Angles of positions; a model's rope.py."""

    def __call__(self, positions: Tensor) -> Rotation: ...

    @property
    def table(self) -> Tensor:
        """f32 [positions, 2, rope / 2]: cosines and sines of every position."""
        ...


class Fused(NamedTuple):
    """Projections of one input, as one matrix: one product."""

    matrix: Matrix  # [sum of rows, k]
    rows: tuple[int, ...]  # of each projection, in order
    is_exact: bool = False  # whether its input is rounded no further, whatever `activations`: it decides what is seen


class QueryWeights(NamedTuple):
    """From the low-rank query to what scores keys and latents."""

    norm: Norm  # of the low-rank query
    q_b: Matrix  # [heads * (nope + rope), q_lora]
    w_uk: Tensor  # [heads, nope, kv_lora]: queries meet latents, not keys
    wq_b: Matrix | None = None  # [index heads * dim, q_lora]; None where nothing is scored


class IndexerShape(NamedTuple):
    """The shape of a lightning indexer."""

    heads: int
    dim: int
    topk: int
    rope: int  # rotated dimensions, the first ones
    is_interleaved: bool  # whether neighbours are rotated together (GLM), or halves (DeepSeek)
    scale: float
    pool: int = 1  # tokens that share an index key, and are selected together


class Embedding(NamedTuple):
    """A vector for each token of the vocabulary; of it, this rank's share (models/parameters.py)."""

    rows: Tensor  # [this rank's share of `vocab`, hidden]
    vocab: int


class Head(NamedTuple):
    """What gives the logits of the vocabulary; of it, this rank's share."""

    matrix: Matrix  # [this rank's share of `vocab`, hidden]
    vocab: int


class Moe(NamedTuple):
    """A mixture of experts with shared ones. Every rank routes among all of them, and holds some."""

    router: Matrix  # [experts, hidden]
    routing: Routing
    shared: Mlp
    gate_up: Matrix  # [this rank's experts, 2 * n, hidden]
    down: Matrix  # [this rank's experts, hidden, n]
    limit: float = inf  # of routed experts, as in Mlp


class Routed(NamedTuple):
    """A token's experts, and the normalised input as the experts will read it: opaque."""

    chosen: Chosen
    value: Any


class Ops(Protocol):
    """What a model asks for, in the order in which a step needs it."""

    kernels: str  # "fast" or "reference", in the words of LLM's `kernels`
    activations: str  # of steps that round, one of ACTIVATION_NAMES: see `round_inputs` in kernels/reference.py

    def for_batch(self, batch: Batch) -> Self:
        """The operations of this step: these, or exact ones where it does not round."""
        ...

    def begin(
        self, tokens: Tensor, positions: Tensor, embedding: Embedding, rotary: Rotary, following: Norm
    ) -> tuple[Residual, Rotation]:
        """Rows of `embedding` for `tokens` and the angles of `positions`, both i64 [T]: where ranks look up each its
        own."""
        ...

    def begin_draft(
        self, embedded: Residual, norm: Norm, hidden: Tensor, hidden_norm: Norm, w: Matrix, following: Norm
    ) -> Residual:
        """An MTP layer's input: w [hidden, 2 * hidden] @ [norm(embedded), hidden_norm(hidden)]."""
        ...

    def select_all(self, positions: Tensor, width: int) -> Selection:
        """i32 [T, width]: every position up to a token's own."""
        ...

    def project(self, x: Residual, norm: Norm, weights: Sequence[Fused]) -> list[Tensor]:
        """f32 [T, rows] = norm(x) @ w.T for each projection of one to three matrices, in order. Rows may be strided."""
        ...

    def make_queries(self, step: Step, low: Tensor, weights: QueryWeights, rows: CacheRows) -> Any:
        """Queries of low f32 [T, q_lora + kv_lora + rope]; also writes the tokens' `rows` into the cache."""
        ...

    def score(self, step: Step, queries: Any, weights: Tensor, rows: CacheRows, index: IndexerShape) -> Tensor:
        """Index logits f32 [T, S]; what follows a token's own position may be left unwritten. weights: f32 [T, heads],
        of the index heads; `rows` name the pool of keys."""
        ...

    def select(self, step: Step, logits: Tensor, queries: Any, index: IndexerShape) -> tuple[Selection, Any]:
        """The exact `index.topk` best, ties to the lower position; and the queries, perhaps computed further:
        selecting uses one multiprocessor for each token; the others can compute the queries."""
        ...

    def attend(
        self, step: Step, queries: Any, selection: Selection, latent: Latents, w_uv: Tensor, scale: float
    ) -> Tensor:
        """Absorbed MLA over the selection, f32 for `add_projection` alone: [T, heads * v], or parts of that sum."""
        ...

    def add_projection(self, x: Residual, seen: Tensor, w: Matrix, following: Norm) -> Residual:
        """x + seen @ w.T: where ranks add up their heads."""
        ...

    def add_mlp(self, x: Residual, norm: Norm, mlp: Mlp, following: Norm) -> Residual:
        """x + mlp(norm(x)): where ranks add up their columns."""
        ...

    def route(self, x: Residual, norm: Norm, moe: Moe) -> Routed:
        """The experts of norm(x)."""
        ...

    def add_experts(self, x: Residual, norm: Norm, routed: Routed, moe: Moe, following: Norm) -> Residual:
        """x + the weighted sum of a token's experts, in the order of the choice, + the shared ones: where ranks add up
        their experts. Inputs of routed experts in BF16 may keep 8 bits."""
        ...

    def normalize(self, x: Residual, norm: Norm) -> Tensor:
        """norm(x), f32 [T, hidden]."""
        ...

    def logits(self, rows: Tensor, head: Head) -> Tensor:
        """f32 [L, vocab] of rows f32 [L, hidden], normalised before: where ranks gather their shares."""
        ...

    def project_head(self, x: Residual, norm: Norm, head: Head) -> Tensor:
        """`logits` of norm(x), f32 [T, vocab], the norm in the same launch."""
        ...

    def choose_experts(self, logits: Tensor, routing: Routing) -> Chosen:
        """Among all experts, by the router's logits f32 [T, experts], then those of this rank; `route` asks for it, and
        whoever wants to see or to give choices overrides it."""
        ...
