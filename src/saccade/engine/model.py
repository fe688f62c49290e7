"""What an engine asks of a family's forward pass. models/dsa/transformer.py and mtp.py are an example."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from saccade.config.file import Config
from saccade.engine.steps.selections import StepSelections
from saccade.ops.step import Batch, Cache

if TYPE_CHECKING:
    from saccade.engine.sample import Packed, Spec


class Runner(Protocol):
    """Steps of a model: a `Model`, or its captured steps in graphs.py."""

    @property
    def ops(self) -> Any:
        """The operations that compute it."""
        ...

    def forward(self, batch: Batch, cache: Cache, capture: StepSelections | None = None) -> Tensor:
        """Hidden states, f32 [T, hidden]. Writes cache rows and states. `capture` receives each layer's selection."""
        ...

    def logits(self, rows: Tensor) -> Tensor:
        """f32 [L, vocab] of rows of hidden states."""
        ...


@runtime_checkable
class Chooser(Runner, Protocol):
    """A runner that also chooses, in the same graph."""

    def choose(self, batch: Batch, cache: Cache, spec: "Spec", capture: StepSelections | None = None) -> "Packed":
        """A step and a token for each row whose logits are wanted, by `spec`, whose columns keep their address. Holds
        until the next step."""
        ...


class Layer(Protocol):
    """An MTP layer."""

    @property
    def ops(self) -> Any: ...

    def forward(
        self, batch: Batch, next_tokens: Tensor, hidden: Tensor, cache: Cache, selection: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def logits(self, rows: Tensor) -> Tensor: ...


class Model(Runner, Protocol):
    """A family's forward pass, over any operations."""

    @property
    def config(self) -> Config: ...

    @property
    def mtp(self) -> Layer | None: ...  # None where its weights were not loaded, or the family has none

    def forward(self, batch: Batch, cache: Cache, capture: list[Tensor] | None = None) -> Tensor:
        """As a Runner's; `capture` may be any list, which receives i32 [T, K]."""
        ...

    def with_ops(self, ops: Any) -> "Model":
        """The same parameters, computed by other operations."""
        ...

    def find_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """`forward` and `logits` of every token, f32 [T, vocab]."""
        ...
