"""The Index: headers only, fast, and every fault of the files a named Problem."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from header_bytes import pack

from saccade.base import strict_json
from saccade.checkpoint.header import parse_json
from saccade.checkpoint.index import INDEX_FILE, Entry, File, parse_header, read_index
from saccade.errors import CheckpointError


def tensor(dtype="F32", shape=(2, 3), start=0, stop=24):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def good(*names, data=True) -> bytes:
    """A file of [2, 3] F32 tensors."""
    header = {n: tensor(start=24 * i, stop=24 * i + 24) for i, n in enumerate(names)}
    return pack({"__metadata__": {"format": "pt"}, **header}, b"\1" * 24 * len(names) if data else b"")


def write(folder: Path, index=None, **files: bytes) -> Path:
    for name, raw in files.items():
        (folder / f"{name}.safetensors").write_bytes(raw)
    if index is not None:
        raw = index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode()
        (folder / INDEX_FILE).write_bytes(raw)
    return folder


def kinds(index) -> list[tuple[str, str]]:
    return [(p.kind, p.name) for p in index.problems]


def test_a_single_file_is_read_by_its_header(tmp_path):
    raw = pack(
        {"a": tensor("BF16", (2, 3), 4, 16), "b": tensor("U8", (4,), 0, 4), "c": tensor("I64", (), 16, 24)}, b"x" * 24
    )
    write(tmp_path, m=raw)
    index = read_index(tmp_path / "m.safetensors")
    base = len(raw) - 24
    assert index.entries == {
        "a": Entry("a", "BF16", (2, 3), "m.safetensors", base + 4, base + 16),
        "b": Entry("b", "U8", (4,), "m.safetensors", base, base + 4),
        "c": Entry("c", "I64", (), "m.safetensors", base + 16, base + 24),
    }
    assert index.files == (File("m.safetensors", len(raw), base, 3),)
    assert (index.root, index.problems, index.notes, index.bytes_read) == (str(tmp_path), (), (), base)
    assert read_index(tmp_path) == index


def test_the_safetensors_library_agrees(tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(
        {"w": torch.arange(6.0).reshape(2, 3), "n": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / "m.safetensors"
    )
    index = read_index(tmp_path)
    assert index.problems == ()
    with safe_open(tmp_path / "m.safetensors", "pt") as f:
        for name in f.keys():  # noqa: SIM118
            entry = index.entries[name]
            raw = (tmp_path / entry.file).read_bytes()[entry.start : entry.stop]
            assert raw == bytes(f.get_tensor(name).view(torch.uint8).flatten().tolist())
            assert entry.shape == tuple(f.get_tensor(name).shape)


def test_shards_with_an_index(tmp_path):
    where = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    write(tmp_path, where, **{"m-1": good("a"), "m-2": good("b", "c")})
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", x=good("a"))  # copies in sub-folders are not ours
    index = read_index(tmp_path)
    assert index.problems == () and index.notes == ()
    assert {n: e.file for n, e in index.entries.items()} == where
    headers = len(good("a", data=False)) + len(good("b", "c", data=False))
    assert index.bytes_read == headers + (tmp_path / INDEX_FILE).stat().st_size


FAULTS = {
    "empty": (b"", "truncated", "m"),
    "three bytes": (b"abc", "truncated", "m"),
    "absurd header": (pack(b"{}", length=1 << 60), "header", "m"),
    "header beyond the file": (pack(b"{}", length=500), "truncated", "m"),
    "not json": (pack(b"{'a': 1}"), "header", "m"),
    "not utf-8": (pack(b'{"\xff": 1}'), "header", "m"),
    "deep json": (pack(b"[" * 100_000), "header", "m"),
    "long number": (pack(b'{"a": ' + b"9" * 5000 + b"}"), "header", "m"),
    "not an object": (pack(b"[]"), "header", "m"),
    "truncated": (good("a", "b")[:-1], "truncated", "m"),
    "oversized": (good("a", "b") + b"\0", "oversized", "m"),
    "entry is a number": (pack({"a": 3}), "entry", "a"),
    "entry without offsets": (pack({"a": {"dtype": "F32", "shape": [1]}}), "entry", "a"),
    "three offsets": (pack({"a": {**tensor(), "data_offsets": [0, 24, 24]}}, b"x" * 24), "entry", "a"),
    "offsets swapped": (pack({"a": tensor(start=24, stop=0)}, b"x" * 24), "entry", "a"),
    "negative offset": (pack({"a": tensor(start=-24, stop=0)}, b"x" * 24), "entry", "a"),
    "float offset": (pack({"a": tensor(stop=24.0)}, b"x" * 24), "entry", "a"),
    "true as a dimension": (pack({"a": tensor(shape=(True, 6))}, b"x" * 24), "entry", "a"),
    "negative shape": (pack({"a": tensor(shape=(-2, -3))}, b"x" * 24), "entry", "a"),
    "string shape": (pack({"a": {**tensor(), "shape": "23"}}, b"x" * 24), "entry", "a"),
    "metadata that is no text": (pack({"__metadata__": {"n": 1}, "a": tensor()}, b"x" * 24), "header", "m"),
    "metadata that is no table": (pack({"__metadata__": ["pt"], "a": tensor()}, b"x" * 24), "header", "m"),
    "surrogate in metadata": (pack({"__metadata__": {"\ud800": ""}, "a": tensor()}, b"x" * 24), "header", "m"),
    "a fourth key": (pack({"a": {**tensor(), "strides": [3, 1]}}, b"x" * 24), "entry", "a"),
    "huge shape": (pack({"a": tensor(shape=(1 << 62, 1 << 62), stop=24)}, b"x" * 24), "bytes", "a"),
    "absurd shape": (pack({"a": tensor(shape=(10**300, 10**300))}, b"x" * 24), "entry", "a"),
    "absurd offset": (pack({"a": tensor(start=0, stop=1 << 63)}, b"x" * 24), "entry", "a"),
    "many huge axes": (pack({"a": tensor(shape=(1 << 62,) * 16)}, b"x" * 24), "bytes", "a"),
    "surrogate in a name": (pack({"a\ud800": tensor()}, b"x" * 24), "name", "'a\\ud800'"),
    "control character in a name": (pack({"a\x1b[2J\n": tensor()}, b"x" * 24), "name", "'a\\x1b[2J\\n'"),
    "no name": (pack({"": tensor()}, b"x" * 24), "name", "''"),
    "long name": (pack({"a" * 1001: tensor()}, b"x" * 24), "name", f"'{'a' * 60}'..."),
    "surrogate as a value": (pack({"a": "\ud800"}), "entry", "a"),
    "too many axes": (pack({"a": tensor(shape=(1,) * 10_000, stop=4)}, b"x" * 4), "entry", "a"),
    "unknown dtype": (pack({"a": tensor("F12")}, b"x" * 24), "dtype", "a"),
    "list as dtype": (pack({"a": tensor(["F32"])}, b"x" * 24), "entry", "a"),
    "bytes do not match": (pack({"a": tensor(stop=20)}, b"x" * 20), "bytes", "a"),
    "half a byte": (pack({"a": tensor("F4", (3,), 0, 1)}, b"x"), "bytes", "a"),
    "overlap": (pack({"a": tensor(), "b": tensor(start=12, stop=36)}, b"x" * 36), "overlap", "b"),
    "same span twice": (pack({"a": tensor(), "b": tensor()}, b"x" * 24), "overlap", "b"),
    "hole": (pack({"a": tensor(), "b": tensor(start=28, stop=52)}, b"x" * 52), "hole", "m"),
    "hole at the start": (pack({"a": tensor(start=8, stop=32)}, b"x" * 32), "hole", "m"),
    "twice in a header": (
        pack(b'{"a": %s, "a": %s}' % ((json.dumps(tensor()).encode(),) * 2), b"x" * 24),
        "duplicate",
        "a",
    ),
    "two offsets keys": (
        pack(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 9], "data_offsets": [0, 1]}}', b"x"),
        "duplicate",
        "data_offsets",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_file_is_one_named_problem(tmp_path, fault):
    raw, kind, name = FAULTS[fault]
    index = read_index(write(tmp_path, m=raw))
    assert kinds(index) == [(kind, "m.safetensors" if name == "m" else name)]
    assert "m.safetensors" in index.problems[0].name + index.problems[0].text
    assert "again" in index.problems[0].text  # the cure
    assert len(index.problems[0].text) < 300
    assert "".join(index.problems[0]).isprintable()


def test_a_truncated_file_says_what_was_expected_and_keeps_its_entries(tmp_path):
    raw = good("a", "b")
    index = read_index(write(tmp_path, m=raw[:-30]))
    assert f"{len(raw) - 30} bytes, expected {len(raw)}" in index.problems[0].text
    assert set(index.entries) == {"a", "b"}  # so that nobody calls them missing as well


def test_sub_byte_dtypes_fill_whole_bytes(tmp_path):
    index = read_index(write(tmp_path, m=pack({"a": tensor("F4", (2, 32), 0, 32)}, b"x" * 32)))
    assert index.problems == () and index.entries["a"].shape == (2, 32)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ('{"a": {"b": 1}, "c": [1, 2]}', []),
        ('{"a:b": "x:y", "c": "\\u003a"}', []),
        ('{"a": 1, "\\u0061": 2}', ["a"]),
        ('{"m": {"x": "1", "y": "::", "x": "2"}, "a": {}, "a": {}}', ["x", "a"]),
        ('{"a": {}, "a": {"dtype": 1}}', ["a"]),
    ],
)
def test_repeated_keys_are_found_in_any_spelling(text, repeated):
    assert parse_json(text.encode())[1] == repeated


def test_a_missing_shard_is_named_with_how_much_it_holds(tmp_path):
    where = {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    index = read_index(write(tmp_path, where, **{"m-1": good("a")}))
    assert kinds(index) == [("missing-file", "m-2.safetensors")]
    assert "2 tensors (b, ...)" in index.problems[0].text and "download" in index.problems[0].text


def test_index_and_files_that_disagree_are_problems_by_tensor(tmp_path):
    where = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    write(tmp_path, where, **{"m-1": good("a", "c"), "m-2": good("c", "d")})
    found = kinds(read_index(tmp_path))
    assert ("index", "b") in found  # mapped to a file that lacks it
    assert ("index", "c") in found  # also in a file that it is not mapped to
    assert ("index", "d") in found  # in a listed file, but not listed
    assert ("duplicate", "m-2.safetensors") in found
    assert len(found) == 4


def test_a_bad_entry_is_not_reported_as_missing_too(tmp_path):
    write(tmp_path, {"a": "m.safetensors"}, m=pack({"a": tensor("F12")}, b"x" * 24))
    assert kinds(read_index(tmp_path)) == [("dtype", "a")]


HOSTILE_INDEX = [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("raw", HOSTILE_INDEX, ids=range(len(HOSTILE_INDEX)))
def test_a_broken_index_file_is_one_problem(tmp_path, raw):
    assert kinds(read_index(write(tmp_path, raw, m=good("a")))) == [("index", INDEX_FILE)]


@pytest.mark.parametrize(
    "file",
    ["../m.safetensors", "/etc/m.safetensors", "x/m.safetensors", "a\\m.safetensors", ".safetensors", "m.bin", ""],
)
def test_an_index_cannot_point_outside_the_directory(tmp_path, file):
    index = read_index(write(tmp_path, {"a": file, "b": "m.safetensors"}, m=good("b")))
    assert kinds(index) == [("index", INDEX_FILE)] and repr(file) in index.problems[0].text


def test_a_tensor_listed_twice_is_a_problem(tmp_path):
    raw = b'{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}'
    assert ("duplicate", "a") in kinds(read_index(write(tmp_path, raw, n=good("a"))))


def test_an_unlisted_file_is_used_if_new_and_ignored_if_known_and_refused_if_both(tmp_path):
    write(tmp_path, {"a": "m.safetensors", "b": "m.safetensors"}, m=good("a", "b"), mtp=good("c"), copy=good("b", "a"))
    index = read_index(tmp_path)
    assert index.problems == () and set(index.entries) == {"a", "b", "c"}
    assert index.entries["b"].file == "m.safetensors"
    assert [f.name for f in index.files] == ["m.safetensors", "mtp.safetensors"]
    assert [n.split()[0] for n in index.notes] == ["copy.safetensors", "mtp.safetensors"]
    write(tmp_path, copy=good("b", "z"))
    assert kinds(read_index(tmp_path)) == [("mixed-file", "copy.safetensors")]


def test_two_unlisted_files_with_the_same_new_names_are_a_problem(tmp_path):
    write(tmp_path, {"a": "m.safetensors"}, m=good("a"), mtp=good("c"), mtq=good("c"))
    assert kinds(read_index(tmp_path)) == [("duplicate", "mtq.safetensors")]


def test_without_an_index_all_files_are_used_if_their_names_are_disjoint(tmp_path):
    index = read_index(write(tmp_path, m=good("a"), n=good("b")))
    assert set(index.entries) == {"a", "b"} and index.problems == () and len(index.notes) == 1
    index = read_index(write(tmp_path, o=good("a", "b", "c")))
    assert sorted(kinds(index)) == [("duplicate", "o.safetensors")] * 2
    assert "a that m.safetensors" in " ".join(p.text for p in index.problems)


def test_files_that_cannot_be_read_are_problems(tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    os.mkfifo(tmp_path / "f.safetensors")
    (tmp_path / "l.safetensors").symlink_to(tmp_path / "nowhere")
    index = read_index(tmp_path)
    assert kinds(index) == [("unreadable", f"{n}.safetensors") for n in "dfl"]


def test_names_in_index_json_are_as_strictly_read(tmp_path):
    for name in ("a\ud800", "\x07", "9" * 5000):
        index = read_index(write(tmp_path, {name: "m.safetensors", "b": "m.safetensors"}, m=good("b")))
        assert [p.kind for p in index.problems] == ["name"] and "".join(index.problems[0]).isprintable()
        index = read_index(write(tmp_path, {"b": f"{name}.safetensors"}, m=good("b")))
        assert index.problems[0].kind == "index" and "".join(index.problems[0]).isprintable()


def test_a_file_with_an_unprintable_name_is_a_problem(tmp_path):
    index = read_index(write(tmp_path, **{"a\nb": good("a")}))
    assert kinds(index) == [("name", "'a\\nb.safetensors'")] and not index.entries


@pytest.mark.parametrize("path", ["nowhere", "empty", "file.txt", "nul\0byte", "a" * 5000])
def test_nothing_to_open_is_an_error(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(
        CheckpointError, match="no such file|no .safetensors file|expected a directory|cannot be opened"
    ):
        read_index(tmp_path / path)
    with pytest.raises(CheckpointError, match="home"):
        read_index("~no-such-user-at-all/x")


def test_parse_header_stops_at_the_header(tmp_path):
    raw = good("a", "b")
    short, size = raw[: -2 * 24], len(raw)
    assert parse_header(short, "m", size) == parse_header(raw, "m", size)
    assert [p.kind for p in parse_header(short[:-1], "m", size)[1]] == ["truncated"]


def test_headers_as_large_as_deepseek_v32_are_parsed_once_and_alone(tmp_path, monkeypatch):
    """92,425 tensors in 163 sparse files of 690 GB together."""
    where, per_file = {}, 92_425 // 163 + 1
    names = [f"model.layers.{i // 1550}.mlp.experts.{i % 256}.down_proj.weight_scale_inv.{i}" for i in range(92_425)]
    size = 7_465_000
    for k in range(163):
        part = names[k * per_file : (k + 1) * per_file]
        table = {n: tensor("F8_E4M3", (size,), i * size, (i + 1) * size) for i, n in enumerate(part)}
        path = tmp_path / f"model-{k:05}.safetensors"
        path.write_bytes(pack({"__metadata__": {"format": "pt"}, **table}))
        os.truncate(path, path.stat().st_size + size * len(part))
        where |= dict.fromkeys(part, path.name)
    write(tmp_path, where)
    parsed = []
    monkeypatch.setattr(
        strict_json, "json", SimpleNamespace(loads=lambda *a, **k: parsed.append(k) or json.loads(*a, **k))
    )
    index = read_index(tmp_path)
    assert len(index.entries) == 92_425 and index.problems == () and index.notes == ()
    assert sum(f.size for f in index.files) > 689e9
    assert [k for k in parsed if "object_pairs_hook" not in k] == parsed and len(
        parsed
    ) == 164  # each header and index.json once; pairs cost four times as much
    assert index.bytes_read < 40e6


def test_the_index_needs_no_torch():
    code = "import sys, saccade.models.dsa.config, saccade.checkpoint.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("control", ["m.safetensors.aria2", "m.safetensors.st", "m.safetensors.lftp-pget-status"])
def test_an_unfinished_download_is_a_problem_by_the_files_name(tmp_path, control):
    """Such a file has its size and its header from the beginning, and zeros where nothing has come yet."""
    write(tmp_path, {"a": "m.safetensors"}, m=good("a"))
    (tmp_path / f"other{control}").write_bytes(b"")  # of another file
    assert read_index(tmp_path).problems == ()
    (tmp_path / control).write_bytes(bytes(20))
    for path in (tmp_path, tmp_path / "m.safetensors"):
        index = read_index(path)
        assert kinds(index) == [("unfinished", "m.safetensors")] and set(index.entries) == {"a"}
        assert f"{control} lies beside it" in index.problems[0].text and f"delete {control}" in index.problems[0].text
    (tmp_path / control).rename(tmp_path / control.replace("m.safetensors", INDEX_FILE))
    assert kinds(read_index(tmp_path)) == [("unfinished", INDEX_FILE)]


def test_a_git_lfs_pointer_is_named_as_such(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4302316440\n"
    write(tmp_path, {"a": "m.safetensors"}, m=pointer)
    [problem] = read_index(tmp_path).problems
    assert (problem.kind, problem.name) == ("header", "m.safetensors") and "git lfs pull" in problem.text
    write(tmp_path, m=pointer.replace(b"git-lfs", b"another"), n=pointer + bytes(2000))
    assert not any("LFS" in p.text for p in read_index(tmp_path).problems if p.name == "n.safetensors")
    (tmp_path / INDEX_FILE).write_bytes(pointer)
    assert any("is a Git LFS pointer" in p.text for p in read_index(tmp_path).problems if p.name == INDEX_FILE)


def test_an_unlisted_file_that_cannot_be_read_may_be_a_part_and_an_empty_one_is_none(tmp_path):
    write(tmp_path, {"a": "m.safetensors"}, m=good("a"), empty=pack({}), broken=b"\1\0", cut=good("c")[:-1])
    index = read_index(tmp_path)
    assert kinds(index) == [("truncated", "broken.safetensors"), ("truncated", "cut.safetensors")]
    assert ["move it away" in p.text for p in index.problems] == [True, False]  # of the other it is known what it holds
    assert "empty.safetensors is not listed by model.safetensors.index.json and holds no tensor: ignored" in index.notes
