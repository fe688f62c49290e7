"""Reading rows: the right bytes from any cut, bounded memory, and one clear error when a file has changed."""

import _thread
import errno
import json
import os
import queue
import signal
import struct
import threading
import time

import pytest
import torch

from saccade.checkpoint import read, staging
from saccade.checkpoint.index import read_index
from saccade.checkpoint.read import GAP, RowRange, join_spans, read_rows, split_ranges
from saccade.checkpoint.staging import Buffer
from saccade.checkpoint.write import write_checkpoint
from saccade.errors import LoadError

DICE = torch.Generator().manual_seed(1)


def tensors():
    for i in range(6):
        yield f"w{i}", torch.randint(0, 200, (300 + i, 64), generator=DICE, dtype=torch.uint8).view(torch.float8_e4m3fn)
        yield f"w{i}_scale_inv", torch.rand(3, 1, generator=DICE)
    yield "cube", torch.randn(5, 7, 3, generator=DICE).bfloat16()
    yield "vector", torch.arange(1000, dtype=torch.int64)
    yield "scalar", torch.tensor(2.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    given = dict(tensors())
    write_checkpoint(folder, {}, given.items(), 3)
    return read_index(folder), given


def whole(index):
    return [RowRange(n, 0, e.shape[0] if e.shape else 1) for n, e in index.entries.items()]


class Keeper:
    """Copies what it is given, as every consumer must."""

    def __init__(self):
        self.pieces = {}

    def __call__(self, name, tensor, first_row):
        # A defaultdict may lose a list: garbage may be collected before it is kept, which lets another thread in.
        self.pieces.setdefault(name, []).append((first_row, tensor.clone()))

    def rows(self, name):
        """The tensor, and its first row; pieces must follow each other."""
        pieces = sorted(self.pieces[name], key=lambda p: p[0])
        if pieces[0][1].ndim == 0:
            assert len(pieces) == 1
            return pieces[0][1], 0
        for (first, rows), (after, _) in zip(pieces, pieces[1:], strict=False):
            assert first + rows.shape[0] == after
        return torch.cat([t.view(torch.uint8) for _, t in pieces]).view(pieces[0][1].dtype), pieces[0][0]


def same(a, b):
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("buffer_bytes", [1, 200, 4096, 20_000, 8 << 20])
def test_every_tensor_arrives_whole_whatever_the_buffer(checkpoint, threads, buffer_bytes):
    index, given = checkpoint
    keep, done = Keeper(), []
    read_rows(index, whole(index), keep, threads, buffer_bytes, done.append)
    assert keep.pieces.keys() == given.keys()
    for name, tensor in given.items():
        rows, first = keep.rows(name)
        assert first == 0 and same(rows, tensor), name
    assert sum(done) == sum(e.stop - e.start for e in index.entries.values())


def test_runs_of_rows_are_those_that_were_asked_for(checkpoint):
    index, given = checkpoint
    ranges = [RowRange("w0", 100, 290), RowRange("cube", 2, 3), RowRange("vector", 999, 1000), RowRange("w1", 5, 5)]
    for buffer_bytes in (64, 1000, 1 << 20):
        keep, done = Keeper(), []
        read_rows(index, ranges, keep, 2, buffer_bytes, done.append)
        assert keep.pieces.keys() == {"w0", "cube", "vector"}
        for name, first, last in ranges[:3]:
            rows, start = keep.rows(name)
            assert start == first and same(rows, given[name][first:last])
        assert sum(done) == 190 * 64 + 21 * 2 + 8


def test_nothing_to_read_calls_nobody(checkpoint):
    def refuse(*_):
        raise AssertionError

    read_rows(checkpoint[0], [], refuse)


def test_large_tensors_are_cut_on_block_borders(checkpoint):
    index, _ = checkpoint
    pieces = list(split_ranges(index, [RowRange("w0", 100, 300)], 150 * 64))
    assert [(p.first_row, p.rows) for p in pieces] == [(100, 28), (128, 128), (256, 44)]
    pieces = list(split_ranges(index, [RowRange("w0", 0, 4)], 64))  # a buffer of one row
    assert [p.rows for p in pieces] == [1, 1, 1, 1]


def test_neighbours_are_read_together_in_file_order_up_to_the_buffer(checkpoint):
    index, _ = checkpoint
    for buffer_bytes in (1000, 20_000, 50_000):
        spans = join_spans(split_ranges(index, reversed(whole(index)), buffer_bytes), buffer_bytes)
        keys = [(s.file, s.start) for s in spans]
        assert keys == sorted(keys) and all(s.stop - s.start <= buffer_bytes for s in spans)
        assert all(s.start <= p.start and p.stop <= s.stop for s in spans for p in s.pieces)
    assert len(join_spans(split_ranges(index, whole(index), 8 << 20), 8 << 20)) == 3  # one for each file


def test_a_short_gap_is_read_over_and_a_long_one_is_not(tmp_path):
    for gap, count in ((GAP, 1), (GAP + 1, 2)):
        folder = tmp_path / str(gap)
        sizes = [8, gap, 8]
        table, at = {}, 0
        for name, size in zip("abc", sizes, strict=True):
            table[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at := at + size]}
        raw = json.dumps(table).encode()
        folder.mkdir()
        (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + os.urandom(at))
        index = read_index(folder)
        ends = [RowRange("a", 0, 8), RowRange("c", 0, 8)]
        assert len(join_spans(split_ranges(index, ends, 1 << 20), 1 << 20)) == count
        keep = Keeper()
        read_rows(index, ends, keep)
        bytes_of = (folder / "m.safetensors").read_bytes()
        for name in "ac":
            e = index.entries[name]
            assert bytes(keep.rows(name)[0].tolist()) == bytes_of[e.start : e.stop]


def test_a_tensor_at_an_odd_address_is_read_right(tmp_path):
    table = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    raw = json.dumps(table).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"abc" + struct.pack("<2f", 1.5, -2))
    keep = Keeper()
    read_rows(read_index(tmp_path), [RowRange("odd", 0, 3), RowRange("f", 0, 2)], keep)
    assert keep.rows("f")[0].tolist() == [1.5, -2.0]


def test_memory_is_one_buffer_for_each_thread(checkpoint):
    index, _ = checkpoint
    sizes, addresses = [], set()

    def make(size):
        sizes.append(size)
        return Buffer(size)

    read_rows(index, whole(index), lambda n, t, r: addresses.add(t.untyped_storage().data_ptr()), 2, 5000, None, make)
    assert len(sizes) == 2 and max(sizes) <= 5000 and len(addresses) <= 2
    assert all(a % 4096 == 0 for a in addresses)


def test_two_threads_take_part(checkpoint):
    index, _ = checkpoint
    both = threading.Barrier(2, timeout=20)  # breaks unless two threads are in consume at once
    waited = threading.local()

    def consume(*_):
        if not hasattr(waited, "once"):
            waited.once = True
            both.wait()

    read_rows(index, whole(index), consume, 2, 1000)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_cut_since_its_header_was_read_is_named(tmp_path, threads):
    write_checkpoint(tmp_path, {}, tensors(), 2)
    index = read_index(tmp_path)
    path = tmp_path / index.files[1].name
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(LoadError, match=f"{path.name}: ends at byte .* shorter"):
        read_rows(index, whole(index), Keeper(), threads, 1000)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_file_that_is_gone_is_named(tmp_path, gone):
    write_checkpoint(tmp_path, {}, tensors(), 2)
    index = read_index(tmp_path)
    (tmp_path / index.files[gone].name).unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LoadError, match=f"{index.files[gone].name}: cannot be read: No such file"):
        read_rows(index, whole(index), Keeper(), threads=1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_the_consumer_stops_all_threads_and_is_raised_once(checkpoint, threads):
    index, _ = checkpoint
    calls, failed = [], threading.Event()

    def consume(name, tensor, first_row):
        calls.append(name)
        if len(calls) == threads:  # the others are between two spans, or in here
            failed.set()
            raise KeyError(name)
        failed.wait(20)
        time.sleep(0.1)  # a busy machine may let the others run before the failure is on record: let them crawl

    before = threading.active_count()
    with pytest.raises(KeyError):
        read_rows(index, whole(index), consume, threads, 64)
    assert len(calls) < threads + 20  # of some thousand
    assert threading.active_count() == before


def test_after_ctrl_c_no_thread_is_still_at_work(checkpoint, request):
    """The signal comes while the caller's thread has nothing left to read and waits for the other."""
    index, _ = checkpoint
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs do not hear it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    main, begun, ended = threading.main_thread(), threading.Event(), []

    def consume(name, rows, first):
        if threading.current_thread() is main:
            assert begun.wait(10)
        elif not begun.is_set():
            begun.set()
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            ended.append(name)

    with pytest.raises(KeyboardInterrupt):
        read_rows(index, whole(index), consume, threads=2, buffer_bytes=16384)
    assert len(ended) == 1


@pytest.mark.parametrize("where", ["get", "start"])
def test_ctrl_c_that_comes_just_as_a_wait_ends_is_no_endless_wait(checkpoint, monkeypatch, where):
    """`get` has taken the only item and raises; `start` has started its thread and raises."""
    index, _ = checkpoint
    left, outcome, ended = [1], [], []

    def interrupted(call):
        def act(*args, **kwargs):
            result = call(*args, **kwargs)
            if left and left.pop():
                raise KeyboardInterrupt
            return result

        return act

    if where == "get":

        class Queue(queue.SimpleQueue):
            get = interrupted(queue.SimpleQueue.get)

        monkeypatch.setattr(read, "SimpleQueue", Queue)
    else:
        monkeypatch.setattr(read.threading.Thread, "start", interrupted(threading.Thread.start))

    def consume(name, rows, first):
        time.sleep(0.01 if threading.get_ident() == caller[0] else 0.3)  # the caller waits for the other
        ended.append(name)

    caller = []

    def run():
        caller.append(threading.get_ident())
        try:
            read_rows(index, whole(index)[:20], consume, threads=2, buffer_bytes=1 << 12)
        except KeyboardInterrupt:
            outcome.append(len(ended))

    _thread.start_new_thread(run, ())
    until = time.monotonic() + 20
    while not outcome and time.monotonic() < until:
        time.sleep(0.05)
    assert outcome, "waits for ever"
    time.sleep(0.4)
    assert len(ended) == outcome[0]  # nobody has gone on


def test_short_reads_are_continued(checkpoint, monkeypatch):
    index, given = checkpoint
    preadv = os.preadv
    monkeypatch.setattr(read.os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:777]], at))
    keep = Keeper()
    read_rows(index, whole(index), keep)
    assert all(same(keep.rows(name)[0], tensor) for name, tensor in given.items())


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (RowRange("nobody", 0, 1), "nobody is not a tensor"),
        (RowRange("w0", 0, 301), "w0 has 300 rows"),
        (RowRange("w0", -1, 3), "w0 has 300 rows"),
        (RowRange("w0", 3, 2), "w0 has 300 rows"),
    ],
)
def test_rows_that_do_not_exist_are_refused(checkpoint, wanted, words):
    with pytest.raises(LoadError, match=words):
        read_rows(checkpoint[0], [wanted], Keeper())


def test_no_descriptor_stays_open(checkpoint):
    index, _ = checkpoint
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_rows(index, whole(index), Keeper(), 2, 1000)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_is_refused_is_one_error_and_memory_that_cannot_be_locked_is_done_without(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    empty = torch.empty

    def limited(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(staging.mmap, "mmap", refuse)
    with pytest.raises(LoadError, match="1,000 bytes to read into: Cannot allocate memory; free memory"):
        Buffer(1000)
    monkeypatch.setattr(torch, "empty", limited)
    assert staging.Cuda(torch.device("cuda")).pin(7).shape == (7,)
