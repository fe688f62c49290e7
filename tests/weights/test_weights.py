"""The Loader against an independent decode: any order, any calls, reused buffers, and nothing by half."""

import gc
import random
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from fused_parameters import fuse
from small_checkpoints import decode, small_config, small_tensors, write_small
from torch import Tensor

from saccade.checkpoint.index import read_index
from saccade.errors import LoadError
from saccade.models.dsa.config import ModelConfig
from saccade.plan import Layout, Plan, make_plan
from saccade.plan.types import Stored
from saccade.weights.loader import Loader, load
from saccade.weights.weights import Weights


def plan_of(root: Path, **kwargs: object) -> Plan:
    return make_plan(ModelConfig.load(root), read_index(root), **kwargs)  # type: ignore[arg-type]


def everything(weights: Weights) -> dict[str, Tensor]:
    return {name: weights.take(name) for name in weights.names()}


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return small_tensors(small_config(), power_of_two=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return write_small(folder, small_config(), tensors, shard_of=lambda n: len(n) % 3, seed=1)


@pytest.fixture(scope="module")
def loaded(root: Path) -> dict[str, Tensor]:
    return everything(load(plan_of(root)))


INDEXERS = [f"model.layers.{i}.self_attn.indexer." for i in range(4)]  # layer 3 is the MTP layer


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_fused_parameter_equals_an_independent_decode_bit_for_bit(
    tmp_path: Path, dtype: str, power_of_two: bool
) -> None:
    tensors = small_tensors(small_config(), seed=2, power_of_two=power_of_two)
    write_small(tmp_path, small_config(), tensors, shard_of=lambda n: len(n) % 4, seed=5)
    weights = everything(load(plan_of(tmp_path, dtype=dtype)))
    held = torch.bfloat16 if dtype == "auto" else torch.float32
    for x in INDEXERS:
        expected = torch.cat([decode(tensors, x + "wk.weight"), decode(tensors, x + "weights_proj.weight")]).to(held)
        assert weights[x + "wk_weights_proj"].dtype == held
        assert torch.equal(weights[x + "wk_weights_proj"], expected), x
        assert weights[x + "wk_weights_proj"].isfinite().all()


def test_every_parameter_equals_an_independent_decode(root: Path, tensors: dict[str, Tensor]) -> None:
    w = everything(load(plan_of(root, dtype="float32")))
    expected = fuse(small_config(), lambda name: decode(tensors, name))
    assert w.keys() == expected.keys()
    wrong = [name for name in w if not torch.equal(w[name], expected[name])]
    assert wrong == []


def test_fp8_is_kept_where_blocks_allow_and_falls_back_to_bf16_where_not(
    loaded: dict[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    x = "model.layers.1."
    assert torch.equal(
        loaded[x + "self_attn.o_proj"].view(torch.uint8), tensors[x + "self_attn.o_proj.weight"].view(torch.uint8)
    )
    assert torch.equal(loaded[x + "self_attn.o_proj.scale"], tensors[x + "self_attn.o_proj.weight_scale_inv"])
    # up_proj starts at row 192 of gate_up_proj, inside a block: the stack cannot keep 128x128 scales.
    assert loaded[x + "mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert x + "mlp.experts.gate_up_proj.scale" not in loaded


def test_loading_over_ff_and_over_00_gives_identical_bytes(root: Path) -> None:
    def fill(byte: int) -> dict[str, Tensor]:
        def allocate(stored: Stored, device: torch.device) -> Tensor:
            return torch.full((stored.nbytes,), byte, dtype=torch.uint8).view(dtypes[stored.dtype]).view(stored.shape)

        return everything(load(plan_of(root), allocate=allocate))

    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    ff, zero = fill(0xFF), fill(0x00)
    assert same_bytes(ff, zero)


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(s, marks=pytest.mark.soak) for s in range(12, 400))])
def test_any_order_over_any_calls_with_reused_buffers_gives_the_same_bytes(
    root: Path, tensors: dict[str, Tensor], loaded: dict[str, Tensor], seed: int
) -> None:
    dice = random.Random(seed)
    pieces = []
    for name, tensor in tensors.items():
        cuts = sorted(
            {0, tensor.shape[0], *(dice.randrange(tensor.shape[0]) for _ in range(dice.choice((0, 0, 1, 3))))}
        )
        pieces += [(name, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    dice.shuffle(pieces)
    loader = Loader(plan_of(root))
    for name, a, b in pieces:
        buffer = tensors[name][a:b].clone()
        loader.feed(name, buffer, a)
        buffer.view(torch.uint8).fill_(0xFF)  # NaN in every dtype: a kept view would show
    assert same_bytes(everything(loader.finish()), loaded)


@pytest.mark.parametrize("seed", range(6))
def test_finish_names_what_has_not_come(root: Path, tensors: dict[str, Tensor], seed: int) -> None:
    absent = random.Random(seed).choice(list(tensors))
    loader = Loader(plan_of(root))
    for name in tensors.keys() - {absent}:
        loader.feed(name, tensors[name])
    with pytest.raises(LoadError, match="have not come") as refusal:
        loader.finish()
    assert absent in str(refusal.value)


def test_a_partly_fed_tensor_is_missing(root: Path, tensors: dict[str, Tensor]) -> None:
    name, loader = "model.layers.0.self_attn.indexer.wk.weight", Loader(plan_of(root))
    for other in tensors.keys() - {name}:
        loader.feed(other, tensors[other])
    loader.feed(name, tensors[name][:40])
    with pytest.raises(LoadError, match="only in part.*indexer.wk.weight"):
        loader.finish()


def test_feed_refuses_repeated_unknown_and_wrong_tensors_at_once(root: Path, tensors: dict[str, Tensor]) -> None:
    loader, name = Loader(plan_of(root)), "model.layers.0.self_attn.indexer.wk.weight"
    loader.feed(name, tensors[name][:10])
    for bad, match in (
        ((name, tensors[name]), "twice"),
        ((name, tensors[name][5:20], 5), "twice"),
        ((name, tensors[name][:, :5], 10), "shape"),
        ((name, tensors[name].T.contiguous()), "shape"),
        ((name, tensors[name], 10), "shape"),
        ((name, tensors[name].bfloat16()), "fed as torch.bfloat16"),
        ((name, tensors[name].view(torch.uint8)), "fed as torch.uint8"),
        (("model.layers.0.self_attn.indexer.wk.bias", tensors[name]), "not a tensor of"),
    ):
        with pytest.raises(LoadError, match=match):
            loader.feed(*bad)


def test_an_abandoned_loader_leaves_nothing_and_a_new_one_loads_right(
    root: Path, tensors: dict[str, Tensor], loaded: dict[str, Tensor]
) -> None:
    plan = plan_of(root)
    loader = Loader(plan)
    for name in list(tensors)[::2]:
        loader.feed(name, tensors[name])
    target = weakref.ref(loader._targets["lm_head"])
    del loader
    gc.collect()
    assert target() is None
    again = Loader(plan)
    for name, tensor in tensors.items():
        again.feed(name, tensor)
    assert same_bytes(everything(again.finish()), loaded)


@pytest.mark.parametrize("scales_first", [True, False])
def test_after_a_full_load_nothing_waits(root: Path, tensors: dict[str, Tensor], scales_first: bool) -> None:
    loader = Loader(plan_of(root))
    for name in sorted(tensors, key=lambda n: n.endswith("_scale_inv") is not scales_first):
        loader.feed(name, tensors[name])
    assert not loader._waiting and not loader._scales


def test_roundings_say_which_upcasts_are_exact(tmp_path: Path, root: Path) -> None:
    name = "model.layers.0.self_attn.indexer.wk.weight"
    rounded = {r.tensor: r.largest for r in load(plan_of(root)).roundings}
    worst = max(largest for tensor, largest in rounded.items() if ".wk." in tensor)
    print(f"wk, any scales: rounds by at most {worst:.2e} (bound {2**-8:.2e})")
    assert worst > 2**-9 and worst <= 2**-8 and rounded[name] > 0
    assert name.replace("wk", "weights_proj") not in rounded  # BF16 to BF16 is a copy
    write_small(tmp_path, small_config(), small_tensors(small_config(), power_of_two=True))
    exact = {r.tensor: r.largest for r in load(plan_of(tmp_path)).roundings}
    assert exact[name] == 0.0 and exact.keys() == rounded.keys()


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_joined_equal_the_whole(root: Path, tensors: dict[str, Tensor], tp: int, ep: int) -> None:
    whole = everything(load(plan_of(root, dtype="float32")))
    ranks = [everything(load(plan_of(root, layout=Layout(tp, ep, r), dtype="float32"))) for r in range(tp)]
    x = "model.layers.2."
    for name, axis in (
        (x + "self_attn.q_b_proj", 0),
        (x + "self_attn.w_uk", 0),
        (x + "self_attn.o_proj", 1),
        ("lm_head", 0),
    ):
        assert torch.equal(torch.cat([r[name] for r in ranks], axis), whole[name]), name
    sharers = tp // ep
    for name in (x + "mlp.experts.gate_up_proj", x + "mlp.experts.down_proj"):
        groups = [ranks[g * sharers : (g + 1) * sharers] for g in range(ep)]
        if name.endswith("down_proj"):
            joined = torch.cat([torch.cat([r[name] for r in g], 2) for g in groups])
        else:
            halves = [[torch.cat([r[name].chunk(2, 1)[h] for r in g], 1) for h in (0, 1)] for g in groups]
            joined = torch.cat([torch.cat(h, 1) for h in halves])
        assert torch.equal(joined, whole[name]), name
    for rank in ranks:
        assert torch.equal(
            rank[x + "self_attn.indexer.wk_weights_proj"], whole[x + "self_attn.indexer.wk_weights_proj"]
        )


def test_weights_are_taken_once_and_none_is_left(root: Path) -> None:
    weights = load(plan_of(root))
    weights.take("lm_head")
    with pytest.raises(LoadError, match="taken before"):
        weights.take("lm_head")
    with pytest.raises(LoadError, match="was not loaded"):
        weights.take("model.layers.0.self_attn.indexer.wk")
    with pytest.raises(LoadError, match="never used.*wk_weights_proj"):
        weights.finish()


def test_progress_is_told_every_byte(root: Path) -> None:
    told: list[tuple[int, int]] = []
    load(plan_of(root), progress=lambda done, total: told.append((done, total)))
    done, totals = [d for d, _ in told], {t for _, t in told}
    assert len(totals) == 1 and max(done) == totals.pop() and len(set(done)) == len(done)


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_is_fed_whole_tensors_in_pieces(root: Path, tensors: dict[str, Tensor], rank: int) -> None:
    """A rank's plan meets rows that it does not need, before and after those it does."""
    plan = plan_of(root, layout=Layout(2, 1, rank))
    expected = everything(load(plan))
    for seed in range(4):
        dice, loader = random.Random(seed), Loader(plan)
        pieces = [(n, a, a + 48) for n, t in tensors.items() for a in range(0, t.shape[0], 48)]
        dice.shuffle(pieces)
        for name, a, b in pieces:
            loader.feed(name, tensors[name][a:b], a)
        assert same_bytes(everything(loader.finish()), expected)


def test_threads_may_feed_weights_and_scales_at_the_same_time(root: Path, tensors: dict[str, Tensor]) -> None:
    plan = plan_of(root)
    expected = everything(load(plan))
    coded = {step.source for step in plan.steps if step.coding}
    scales = [n + "_scale_inv" for n in coded]
    pieces = [(n, a, a + 16) for n in sorted(coded) for a in range(0, tensors[n].shape[0], 16)]
    rest = tensors.keys() - coded - set(scales)
    for turn in range(20):
        loader = Loader(plan)
        for name in rest:
            loader.feed(name, tensors[name])

        def feed_weights(loader: Loader = loader) -> None:
            for name, a, b in pieces:
                loader.feed(name, tensors[name][a:b], a)

        def feed_scales(loader: Loader = loader) -> None:
            for name in scales:
                loader.feed(name, tensors[name])

        threads = [threading.Thread(target=job) for job in (feed_weights, feed_scales)]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads[:: 1 if turn % 2 else -1]:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(0.005)
        assert same_bytes(everything(loader.finish()), expected), turn


def test_a_finished_loader_refuses_more(root: Path, tensors: dict[str, Tensor]) -> None:
    loader = Loader(plan_of(root))
    for name, tensor in tensors.items():
        if name != "lm_head.weight":
            loader.feed(name, tensor)
    loader.feed("lm_head.weight", torch.nn.Parameter(tensors["lm_head.weight"]))
    weights = loader.finish()
    assert not any(t.requires_grad for t in everything(weights).values())
    with pytest.raises(LoadError, match="twice"):
        loader.finish()
    with pytest.raises(LoadError, match="after finish"):
        loader.feed("lm_head.weight", tensors["lm_head.weight"])
