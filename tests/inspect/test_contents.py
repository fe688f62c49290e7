"""What is wrong with the bytes of a checkpoint whose headers are sound: each fault is named, and nothing else is accused."""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from header_checkpoints import published, write_headers
from independent_codec import make, write
from layouts import config_of, read_layouts
from safetensors.torch import save_file
from small_checkpoints import small_config, small_tensors, sums, write_small
from torch import Tensor

import saccade.inspect.blocks as blocks
import saccade.inspect.contents as contents
import saccade.inspect.judge as judge
from saccade.bench.files.check import check_once
from saccade.bench.process import in_process
from saccade.checkpoint.coding import Coding
from saccade.checkpoint.encoding import ENCODINGS
from saccade.checkpoint.index import read_index
from saccade.checkpoint.open import open_model
from saccade.errors import CheckpointError, LoadError, RequestError
from saccade.inspect.contents import check_contents
from saccade.inspect.findings import UPCAST_BOUND, Contents
from saccade.inspect.show import show_upcasts
from saccade.inspect.stored import Pair
from saccade.plan.problems import show_problems

A = "model.layers.1.self_attn."
KV = A + "kv_a_proj_with_mqa.weight"  # codes [448, 256], scales [4, 2]
WK = A + "indexer.wk.weight"  # codes [64, 256], scales [1, 2]
GATE = "model.layers.1.mlp.gate.weight"
UE8M0 = {"quantization_config": {"scale_fmt": "ue8m0"}}
SHARD = "model-00002-of-00003.safetensors"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


def check(root: Path, **options: object) -> Contents:
    return check_contents(*open_model(root), **options)  # type: ignore[arg-type]


def write_three(root: Path, tensors: Tensors, **more: object) -> Path:
    names = sorted(tensors)
    return write_small(root, small_config(**more), tensors, shard_of=lambda n: names.index(n) * 3 // len(names))


def put(name: str, at: tuple[int, ...], value: float) -> Change:
    return lambda t: t[name].__setitem__(at, value)


def put_code(name: str, at: tuple[int, ...], code: int) -> Change:
    return lambda t: t[name].view(torch.uint8).__setitem__(at, code)


def zero(name: str) -> Change:
    return lambda t: t[name].view(torch.uint8).zero_()


def both(*changes: Change) -> Change:
    return lambda t: [change(t) for change in changes]


def as_dtype(name: str, dtype: torch.dtype) -> Change:
    return lambda t: t.update({name: t[name].to(dtype)})


BLOCK = (slice(128, 256), slice(128, 256))  # what lies under scale [1, 1]
S = KV + "_scale_inv"
# What breaks; kind, tensor and text of the finding, or None if it is none; whether it is a problem.
FAULTS: dict[str, tuple[Change, tuple[str, str, str] | None, bool]] = {
    "a NaN code": (put_code(KV, (3, 5), 0x7F), ("not-finite", KV, "NaN or infinite: 1, first at [3, 5]"), True),
    "a NaN code with a sign": (put_code(KV, (447, 255), 0xFF), ("not-finite", KV, "NaN or infinite: 1, first at [447, 255]"), True),
    "a NaN in BF16": (put(GATE, (2, 9), math.nan), ("not-finite", GATE, "NaN or infinite: 1, first at [2, 9]"), True),
    "minus infinity in BF16": (both(put(GATE, (2, 9), -math.inf), put(GATE, (7, 0), -math.inf)), ("not-finite", GATE, "NaN or infinite: 2, first at [2, 9]"), True),
    "a NaN in F32": (put(A + "indexer.k_norm.bias", (63,), math.nan), ("not-finite", A + "indexer.k_norm.bias", ": 1, first at [63]"), True),
    "a scale that is NaN": (put(S, (2, 1), math.nan), ("bad-scale", S, "scales that are NaN or infinite: 1, first at [2, 1]"), True),
    "an infinite scale": (put(S, (2, 1), math.inf), ("bad-scale", S, "scales that are NaN or infinite: 1, first at [2, 1]"), True),
    "a NaN in E8M0": (both(as_dtype(S, torch.float8_e8m0fnu), put_code(S, (3, 0), 255)), ("bad-scale", S, "scales that are NaN or infinite: 1, first at [3, 0]"), True),
    "a negative scale": (put(S, (0, 1), -0.5), ("bad-scale", S, "negative scales: 1, first at [0, 1]"), True),
    "zero scales": (both(put(S, (1, 1), 0.0), put(S, (3, 0), -0.0)), ("bad-scale", S, "zero scales: 2, first at [1, 1]"), True),
    "all scales zero": (zero(S), ("bad-scale", S, "zero scales: 8, first at [0, 0]"), True),
    "a zero scale over zeros": (both(put(S, (1, 1), 0.0), lambda t: t[KV][BLOCK].view(torch.uint8).zero_()), None, False),
    "a zero scale over zeros but one": (both(put(S, (1, 1), 0.0), lambda t: t[KV][BLOCK].view(torch.uint8).zero_(), put_code(KV, (255, 128), 1)), ("bad-scale", S, "zero scales: 1, first at [1, 1]"), True),
    "an outlier": (put(S, (1, 1), 2.0**12), ("outlier", S, "scales farther than 2^12 from the median"), False),
    "a tiny outlier": (put(S, (3, 1), 2.0**-30), ("outlier", S, ": 1, first at [3, 1]"), False),
    "an outlier over zeros": (both(put(S, (1, 1), 2.0**12), lambda t: t[KV][BLOCK].view(torch.uint8).zero_()), None, False),
    "a weight of zeros": (zero(GATE), ("all-zero", GATE, "[8, 256] holds nothing but zeros"), True),
    "codes of zeros": (zero(KV), ("all-zero", KV, "[448, 256] holds nothing but zeros"), True),
    "a bias of zeros": (zero(A + "indexer.k_norm.bias"), ("all-zero", A + "indexer.k_norm.bias", "zeros, as it may"), False),
    "scales that are no powers of two": (both(put(S, (0, 1), 0.75 * 2**-5), put(S, (2, 0), 0.7 * 2**-5)), ("not-ue8m0", S, "no powers of two, of 8: 2, first at [0, 1]"), False),
    "a zero input scale": (lambda t: t.update({A + "o_proj.input_scale": torch.zeros(())}), ("bad-scale", A + "o_proj.input_scale", "zero scales: 1"), False),
    "a NaN among scales of the cache": (lambda t: t.update({A + "k_scale": torch.tensor([1.0, math.nan])}), ("bad-scale", A + "k_scale", ": 1, first at [1]"), False),
    "an outlier among scales of the cache": (lambda t: t.update({A + "v_scale": torch.tensor([1.0, 1.0, 2.0**20])}), ("outlier", A + "v_scale", ": 1, first at [2]"), False),
    "no scale by the table": (lambda t: t.update({A + "logit_scale": torch.tensor([-1.0, 2.0**20, 0.0])}), None, False),
    "words beside codes of another group": (lambda t: t.update({S: torch.ones(4, 2, dtype=torch.int32)}), ("not-judged", S, "is a scale in I32, which is only read"), False),
    "bytes of zero": (lambda t: t.update({A + "o_proj.extra": torch.zeros(4, dtype=torch.uint8)}), ("not-judged", A + "o_proj.extra", "whether that means zero in U8 is not known"), False),
    "a wk beyond BF16": (both(put_code(WK, (0, 0), 0x7E), put(WK + "_scale_inv", (0, 0), 2.0**127)), ("not-finite", WK, "exceeds the range of BF16"), True),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(fault: str, tmp_path: Path) -> None:
    change, expected, is_problem = FAULTS[fault]
    tensors = small_tensors(small_config())
    change(tensors)
    found = check(write_three(tmp_path, tensors, **UE8M0))
    told, untold = (found.problems, found.notes) if is_problem else (found.notes, found.problems)
    if expected is None:
        assert told == untold == ()
        return
    kind, name, text = expected
    assert [(p.kind, p.name) for p in told] == [(kind, name)]
    assert any(part in told[0].text for part in text.split("|")), told
    assert [p for p in untold if p.name not in (name, WK + "_scale_inv")] == []


@pytest.mark.parametrize(("code", "problems"), [(0x77, []), (0x78, [("not-finite", KV)])])  # 240 and 256 times 2^120
def test_a_code_that_its_scale_takes_beyond_bf16_is_a_problem(
    tmp_path: Path, code: int, problems: list[tuple[str, str]]
) -> None:
    tensors = small_tensors(small_config())
    both(put_code(KV, (447, 5), code), put(S, (3, 0), 2.0**120))(tensors)
    found = check(write_three(tmp_path, tensors))
    assert [(p.kind, p.name) for p in found.problems] == problems
    assert all(
        p.text == "exceeds the range of BF16 under some of its scales: 1, first at [3, 0]" for p in found.problems
    )
    assert [(p.kind, p.name) for p in found.notes] == [("outlier", S)]


@pytest.mark.parametrize(("exponent", "is_read"), [(58, False), (59, True), (-58, False), (-59, True)])
def test_codes_are_read_again_only_under_scales_that_could_take_them_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exponent: int, is_read: bool
) -> None:
    """2^9 of a code times 2^59 of each of two scales is 2^127. A file may say how to divide: then small ones count."""
    read: list[str] = []
    monkeypatch.setattr(judge, "find_beyond", lambda index, pair, second: read.append(pair.codes.name))
    tensors = small_tensors(small_config())
    put(S, (3, 0), 2.0**exponent)(tensors)
    assert check(write_three(tmp_path, tensors)).problems == ()
    assert read == [KV] * is_read


@pytest.mark.parametrize("row", [128, 130, 191, 192, 255])
def test_the_code_that_a_zero_scale_hides_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    """Codes come in pieces of 3 rows: most begin inside a block, and others of the block hold zeros only."""
    monkeypatch.setattr(blocks, "DECODED_AT_ONCE", 800)
    tensors = small_tensors(small_config())
    for change in (put(S, (1, 1), 0.0), put(S, (0, 0), 0.0), put(S, (2, 0), 0.0), zero(KV)):
        change(tensors)
    tensors[KV][300:, 128:] = 1.0  # under scales that are not zero
    sound = check(write_three(tmp_path / "a", tensors))
    assert sound.problems == ()
    put_code(KV, (row, 200), 1)(tensors)
    found = check(write_three(tmp_path / "b", tensors))
    assert [p.text for p in found.problems] == ["zero scales: 1, first at [1, 1]"]


def test_scales_may_be_written_in_any_shape(tmp_path: Path) -> None:
    """One for each row as [rows], one for all as []: what is under a zero is found all the same."""
    codes = torch.ones(6, 40).to(torch.float8_e4m3fn)
    codes[4] = 0
    rows = {e.name: e for e in ENCODINGS}
    for scale, name, count in (
        (torch.ones(6), "FP8 per channel", 1),
        (torch.ones(6, 1), "FP8 per channel", 1),
        (torch.ones(()), "FP8 per tensor", 1),
        (torch.ones(1), "FP8 per tensor", 1),
        (torch.ones(6, 2), "MXFP8", 3),
    ):
        scale.flatten()[-1:] = 0.0
        scale.view(-1)[4 : 4 + count] = 0.0
        save_file({"w": codes, "s": scale}, tmp_path / "model.safetensors")
        index = read_index(tmp_path)
        pair = Pair(Coding(rows[name], (6, 40), "w", "s"), index.entries["w"], index.entries["s"])
        used = blocks.find_used(index, pair, 0.0, math.inf)["zero"]
        expected = [
            i
            for i, s in enumerate(scale.flatten().tolist())
            if s == 0 and not (scale.numel() > 1 and i // (scale.numel() // 6) == 4)
        ]
        assert (used.total, used.first) == (len(expected), expected[0])


def test_a_sound_checkpoint_has_no_finding(tmp_path: Path) -> None:
    root = write_three(tmp_path, small_tensors(small_config()), **UE8M0)
    found = check(root)
    assert found.was_scanned and found.problems == found.notes == ()
    assert found.read_bytes == sum(e.stop - e.start for e in read_index(root).entries.values())


def test_scales_need_be_powers_of_two_only_where_that_is_declared(tmp_path: Path) -> None:
    tensors = small_tensors(small_config(), power_of_two=False)
    assert check(write_three(tmp_path / "a", tensors)).notes == ()
    notes = check(write_three(tmp_path / "b", tensors, **UE8M0)).notes
    assert all(p.text.endswith("engines that pack scales into exponents lose the mantissa") for p in notes)
    assert {p.name for p in notes} == {n for n in tensors if n.endswith("scale_inv")}
    assert len(show_problems(notes).splitlines()) < len(notes) / 2  # folded


def test_the_findings_do_not_depend_on_buffers_threads_or_hashing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = small_tensors(small_config(), power_of_two=False)
    for change, expected, _ in (
        FAULTS[f] for f in ("a NaN code with a sign", "zero scales", "a bias of zeros", "a NaN in BF16")
    ):
        assert expected is not None
        change(tensors)
    root = write_three(tmp_path / "m", tensors, **UE8M0)
    (tmp_path / "sums").write_text(sums(root))
    whole = check(root, threads=1)
    assert len(whole.problems) == 3 and len(whole.notes) > 10
    monkeypatch.setattr(contents, "READ_BUFFER", 5000)
    for threads, listing in ((1, None), (3, None), (3, str(tmp_path / "sums"))):
        cut = check(root, threads=threads, listing=listing)
        assert (cut.problems, cut.notes, cut.upcasts) == (whole.problems, whole.notes, whole.upcasts)
        assert cut.digests == (None if listing is None else 5)


def test_what_has_come_of_an_unfinished_download_is_judged(tmp_path: Path) -> None:
    """Zeros where nothing has come yet are told by name, beside the control file that the headers' proof names."""
    tensors = small_tensors(small_config())
    name = "model.layers.1.self_attn.o_proj.weight"
    zero(name)(tensors)
    root = write_three(tmp_path, tensors)
    file = read_index(root).entries[name].file
    (root / f"{file}.aria2").write_bytes(bytes(20))
    assert [(p.kind, p.name) for p in read_index(root).problems] == [("unfinished", file)]
    assert [(p.kind, p.name) for p in check(root).problems] == [("all-zero", name)]


def test_alike_findings_of_several_layers_are_one_line(tmp_path: Path) -> None:
    tensors = small_tensors(small_config())
    for layer in range(3):
        tensors[S.replace("layers.1", f"layers.{layer}")][1, layer % 2] = 0.0
    text = show_problems(check(write_three(tmp_path, tensors)).problems)
    assert text == (
        "bad-scale: model.layers.{0-2}.self_attn.kv_a_proj_with_mqa.weight_scale_inv (3 of them)"
        " zero scales: 1, first at [1, {0-1}]"
    )


# The indexer.


@pytest.mark.parametrize("power_of_two", [True, False])
def test_the_upcast_of_every_wk_is_measured(tmp_path: Path, power_of_two: bool) -> None:
    tensors = small_tensors(small_config(), power_of_two=power_of_two)
    found = check(write_three(tmp_path, tensors)).upcasts
    assert [u.tensor for u in found] == [WK.replace("layers.1", f"layers.{i}") for i in range(4)]  # the MTP layer's too
    for u in found:
        scale = tensors[u.tensor + "_scale_inv"]
        assert (u.least_scale, u.largest_scale) == (scale.min(), scale.max())
        exact = tensors[u.tensor].double() * scale.double().repeat_interleave(128, 1)[:, :256]
        product = exact.float()
        error = ((product.bfloat16().double() - product.double()) / product.double()).abs().nan_to_num().max()
        assert u.rounding == pytest.approx(float(error), rel=1e-5)
        assert u.is_power_of_two == power_of_two == (u.rounding == 0)
        assert u.rounding <= UPCAST_BOUND
    (line,) = show_upcasts(found)
    assert line.startswith("indexer: model.layers.{0-3}.self_attn.indexer.wk.weight (4, FP8 128x128): scales ")
    assert ("exact, bit for bit" in line) == power_of_two and ("bound 2^-8" in line) != power_of_two


def test_a_wk_in_bf16_has_no_scale_and_is_exact(tmp_path: Path) -> None:
    tensors = small_tensors(small_config())
    for i in range(4):
        name = WK.replace("layers.1", f"layers.{i}")
        tensors[name] = tensors[name].bfloat16()
        del tensors[name + "_scale_inv"]
    (line,) = show_upcasts(check(write_three(tmp_path, tensors)).upcasts)
    assert line.endswith("(4, BF16): no scale; upcast to BF16 exact, bit for bit")


# Digests.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_three(tmp_path / "m", small_tensors(small_config()))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("mark", [" ", "*"])
def test_equal_digests_are_counted(root: Path, tmp_path: Path, scan: bool, mark: str) -> None:
    listing = tmp_path / "sums"
    listing.write_text(sums(root, mark).replace("  config", "  ./config") + "\r\n")
    found = check(root, scan=scan, listing=str(listing))
    assert found.problems == found.notes == ()
    assert (found.digests, found.was_scanned) == (5, scan)


def test_a_list_may_lie_in_the_model_and_shout(root: Path) -> None:
    """Neither it nor a hidden file is a file too many."""
    lines = [line.split("  ") for line in sums(root).splitlines()]
    (root / "SHA256SUMS").write_text("".join(f"{digest.upper()}  {name}\n" for digest, name in lines))
    (root / ".gitattributes").write_text("")
    found = check(root, scan=False, listing=str(root / "SHA256SUMS"))
    assert (found.problems, found.notes, found.digests) == ((), (), 5)


@pytest.mark.parametrize("scan", [True, False])
def test_what_the_digests_say_is_named(root: Path, tmp_path: Path, scan: bool) -> None:
    listing = tmp_path / "sums"
    lines = sums(root).splitlines()
    listing.write_text("\n".join([*(x for x in lines if "00003-of" not in x), "0" * 64 + "  tokenizer.json"]))
    with (root / SHARD).open("r+b") as f:  # the sign of the last number: nothing but its digest tells
        f.seek(-1, 2)
        last = f.read(1)[0]
        f.seek(-1, 2)
        f.write(bytes([last ^ 0x80]))
    (root / "notes.txt").write_text("mine")
    found = check(root, scan=scan, listing=str(listing))
    assert [(p.kind, p.name) for p in found.problems] == [
        ("missing-file", "tokenizer.json"),
        ("sha256", SHARD),
        ("sha256", "model-00003-of-00003.safetensors"),
    ]
    changed = next(p for p in found.problems if p.name == SHARD)
    assert hashlib.sha256((root / SHARD).read_bytes()).hexdigest() in changed.text
    assert [(p.kind, p.name) for p in found.notes] == [("extra-file", "notes.txt")]
    assert found.digests == 3


BAD_LISTS = {
    "empty": ("", "is empty"),
    "no digest": ("abc  config.json\n", "line 1: expected 64 hexadecimal digits"),
    "no name": ("0" * 64 + "\n", "line 1: expected"),
    "outside the model": ("0" * 64 + "  ../config.json\n", "not a file name relative to the model"),
    "absolute": ("0" * 64 + "  /etc/hostname\n", "not a file name relative to the model"),
    "two digests of one file": ("0" * 64 + "  a\n" + "1" * 64 + "  ./a\n", "line 2: 'a' has another digest further up"),
    "the other form": (
        "SHA256 (config.json) = " + "0" * 64 + "\n",
        "a file name, as sha256sum writes them without --tag, found",
    ),
    "no text": ("\udcff", "is not text"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_list_that_is_none_is_one_clear_error(root: Path, tmp_path: Path, case: str) -> None:
    text, message = BAD_LISTS[case]
    (tmp_path / "sums").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check(root, listing=str(tmp_path / "sums"))


def test_a_file_of_the_list_that_cannot_be_read_is_a_problem(root: Path, tmp_path: Path) -> None:
    long = "x" * 301
    given = sums(root) + f"{'0' * 64}  {long}\n{'0' * 64}  circle\n"
    (tmp_path / "sums").write_text(given)
    for name in ("circle", "other circle"):  # one of them is not in the list
        (root / name).symlink_to(root / name)
    found = check(root, scan=False, listing=str(tmp_path / "sums"))
    assert found.digests == 5 and found.notes == ()
    assert [(p.kind, p.name, p.text.partition(": ")[2]) for p in found.problems] == [
        ("unreadable", "'" + "x" * 60 + "'...", "File name too long"),
        ("unreadable", "circle", "Too many levels of symbolic links"),
    ]


@pytest.mark.parametrize("listing", ["nowhere", "."])
def test_a_list_that_cannot_be_read_is_one_clear_error(root: Path, tmp_path: Path, listing: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file|is not a regular file"):
        check(root, listing=str(tmp_path / listing))


# Reading.


def test_unsound_files_are_hashed_but_not_scanned(root: Path, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text(sums(root))
    with (root / SHARD).open("r+b") as f:
        f.truncate(1000)
    found = check(root, listing=str(tmp_path / "sums"))
    assert not found.was_scanned and found.digests == 4
    assert [(p.kind, p.name) for p in found.problems] == [("sha256", SHARD)]
    assert [p.kind for p in found.notes] == ["not-read"]


@pytest.mark.parametrize("with_digests", [True, False])
def test_a_file_that_shrinks_meanwhile_is_one_clear_error(root: Path, tmp_path: Path, with_digests: bool) -> None:
    (tmp_path / "sums").write_text(sums(root))
    config, index = open_model(root)
    with (root / SHARD).open("r+b") as f:
        f.truncate((root / SHARD).stat().st_size - 10)
    with pytest.raises(LoadError, match=f"{SHARD}: ends at byte"):
        check_contents(config, index, listing=str(tmp_path / "sums") if with_digests else None, threads=2)


def test_progress_reaches_the_bytes_of_all_tensors(root: Path) -> None:
    told: list[tuple[int, int]] = []
    found = check(root, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (found.read_bytes, found.read_bytes) and len(told) >= 3
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_memory_stays_below_the_printed_figure(tmp_path: Path) -> None:
    """In a process of its own, on 120 MB."""
    config = small_config(vocab_size=60_000)
    root = write_headers(tmp_path, config, published(config, True))
    assert sum(f.size for f in read_index(root).files) > 120e6
    found = in_process(check_once, str(root), 2, None)
    assert found["problems"] > 100  # the files are sparse: all is zero
    assert 4 << 20 < found["extra_bytes"] < found["bound_bytes"] < 40 << 20


def test_threads_are_counted_from_one(root: Path) -> None:
    with pytest.raises(RequestError, match="threads"):
        check(root, threads=0)


def test_a_global_scale_of_zero_is_a_problem_whatever_the_codes_are(tmp_path: Path) -> None:
    """It turns a whole matrix to zeros, or, where it divides, to infinity."""
    layout = read_layouts()["05-nvfp4-everywhere"]
    config = config_of(layout, small=True)
    made = make(layout, config)
    name = next(n for n in made.tensors if n.endswith("indexer.wk.weight_scale_2"))
    for value in (0, -1):
        made.tensors[name].data[...] = value
        found = check(write(tmp_path / str(value), config, made.tensors))
        assert ("bad-scale", name) in [(p.kind, p.name) for p in found.problems]
        assert found.upcasts and name.removesuffix("_scale_2") not in {u.tensor for u in found.upcasts}  # not "exact"
