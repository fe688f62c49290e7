"""Un-absorbed attention of prompts with a selection in bits, against the absorbed reference."""

import pytest
import torch
from paged_steps import DEVICE, Step
from torch import Tensor

from saccade.kernels import PAGE, reference
from saccade.kernels.attention import masked
from saccade.kernels.attention.expand import expand_latents
from saccade.kernels.attention.mask import read_words, write_mask
from saccade.kernels.attention.masked import MaskedConfig, can_be_masked, masked_attention
from saccade.kernels.types import Latents, Rotation, Selection

HEADS, NOPE, ROPE, V, LORA = 2, 32, 16, 16, 64


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN: what is read must have been written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Prompts(Step):
    """A step's tokens with queries, a pool of latents, and selections of `topk` of what each may see."""

    def __init__(self, lengths: list[int], tokens: list[int], pages: int, topk: int = 20, coded: bool = False) -> None:
        super().__init__(lengths, tokens, pages)
        self.lengths = torch.tensor(lengths, device=DEVICE)
        self.q = self.normal(self.count, HEADS, NOPE + ROPE)
        self.latent = self.latents(LORA, ROPE, coded=coded)
        self.w_uk = self.normal(HEADS, NOPE, LORA, dtype=torch.bfloat16) * 0.2
        self.w_uv = self.normal(HEADS, V, LORA, dtype=torch.bfloat16) * 0.2
        self.turn: Rotation = self.rotation(ROPE)
        logits = self.normal(self.count, pages * PAGE)
        hidden = torch.arange(pages * PAGE, device=DEVICE) > self.positions[:, None]
        self.selection: Selection = reference.select(logits.masked_fill(hidden, float("-inf")), self.positions, topk)

    def attend(self, **options: object) -> Tensor:
        return masked_attention(
            self.q, self.latent, self.page_table, self.lengths, self.request, self.positions, self.selection, self.w_uk,
            self.w_uv, self.turn, 0.1, **options,  # type: ignore[arg-type]
        )  # fmt: skip

    def expect(self) -> Tensor:
        """f64 [T, heads, v], by way of the latent space."""
        nope, rope = self.q[..., :NOPE].double(), reference.rotate(self.q[..., NOPE:], self.turn, True)
        q = torch.cat([torch.einsum("thn,hnc->thc", nope, self.w_uk.double()), rope.double()], 2)
        seen = reference.sparse_attention(
            q.float(), self.latent, self.page_table, self.request, self.selection, 0.1, LORA
        )
        return torch.einsum("thc,hvc->thv", seen.double(), self.w_uv.double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


# One prompt; a later chunk of one; several requests whose tokens share tiles of queries, with decodes among them.
STEPS = [([75], [75], 2), ([190], [20], 3), ([70, 5, 130, 90], [20, 5, 1, 12], 3)]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("lengths", "tokens", "pages"), STEPS)
def test_a_mask_attends_to_the_selection(lengths: list[int], tokens: list[int], pages: int, coded: bool) -> None:
    step = Prompts(lengths, tokens, pages, coded=coded)
    wanted = step.expect()
    assert error(step.attend(), wanted) < 2e-5
    rounded = step.attend(activations="bf16")
    assert 1e-4 < error(rounded, wanted) < 5e-3 and rounded.equal(step.attend(activations="fp8"))


@pytest.mark.parametrize(
    "options",
    [
        {"config": MaskedConfig(rows=16)},
        {"config": MaskedConfig(rows=32, columns=16)},
        {"room": 1},  # of one head at a time
    ],
)
def test_attention_does_not_depend_on_how_the_work_is_dealt(options: dict[str, object]) -> None:
    step = Prompts([70, 130, 90], [12, 9, 19], 3)
    torch.testing.assert_close(step.attend(**options), step.attend(), rtol=1e-4, atol=1e-5)


def test_words_are_the_selection_and_lists_leave_nothing_out() -> None:
    """Tokens that select few of many pages: tiles of queries see some pages only, of several requests."""
    step = Prompts([300, 40, 200], [20, 9, 30], 5, topk=3)
    mask = write_mask(step.selection, step.request, step.positions, 5, 3, 16)
    seen = read_words(mask.words, step.count)
    wanted = torch.zeros(step.count, 5 * PAGE + 1, dtype=torch.bool, device=DEVICE)
    wanted.scatter_(1, torch.where(step.selection < 0, 5 * PAGE, step.selection).long(), True)
    assert seen.equal(wanted[:, :-1])
    pages = seen.unflatten(1, (5, PAGE)).any(2)
    for block, count in enumerate(mask.counts.tolist()):
        rows = range(16 * block, min(16 * block + 16, step.count))
        found = {(int(step.request[t]) * 5 + int(p)) for t in rows for p in pages[t].nonzero()}
        assert mask.tiles[block, :count].tolist() == sorted(found) and 0 < count < 15


def test_keys_and_values_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are taken in groups; a group's keys and values are within the room that there is."""
    step, taken = Prompts([70], [70], 2), []

    def note(*args: object) -> object:
        found = expand_latents(*args)  # type: ignore[arg-type]
        taken.append(found.keys.nbytes + found.values.nbytes)
        return found

    monkeypatch.setattr(masked, "expand_latents", note)
    room = 2 * PAGE * (NOPE + V) * 2 * 2  # a head of two pages in two parts
    found = step.attend(room=room)
    assert taken == [room, room] and error(found, step.expect()) < 2e-5


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_those_who_see_it_alone(value: float, coded: bool) -> None:
    step = Prompts([70], [70], 2, topk=8, coded=coded)
    row = int(step.page_table[0, 0]) * PAGE + 33
    changed = reference.read_latents(step.latent, slice(row, row + 1))
    changed[0, 5] = value
    reference.write_latents(step.latent, torch.tensor([row], device=DEVICE), changed)
    has_seen = (step.selection == 33).any(1)
    assert 0 < has_seen.sum() < 37
    for activations in ("exact", "bf16"):
        found = step.attend(activations=activations)
        assert found[has_seen].isnan().all() and found[~has_seen].isfinite().all()
    step.selection[3] = -1
    assert step.attend()[3].isnan().all()


def test_shapes_that_no_kernel_takes_are_known() -> None:
    step = Prompts([10], [10], 1)
    assert can_be_masked(step.latent, step.w_uk, step.w_uv)
    assert not can_be_masked(Latents(step.latent.data.float()), step.w_uk, step.w_uv)
    assert not can_be_masked(step.latent, step.w_uk[:, :24], step.w_uv)
