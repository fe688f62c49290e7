"""Sums, and columns side by side, of the GPUs of one host: small messages, over memory that all of them can write to.

A program owns blocks of 512 numbers. It writes each into every rank's memory, raises a flag there, waits for the flags
of all ranks in its own memory, and adds in rank order: all ranks have the same bits. It goes on as the kernels of one
rank do: the residual is added, and prepared for the norm that follows. With two `steps` a block goes to one rank, which
adds and gives the sum to all: two waits, but (2 / ranks) of the bytes.

Each block has a count of its own, on the device, so a CUDA graph holds no number of a launch. Blocks lie in two halves
in turn. A rank that is one sum ahead writes into the other half. It cannot be two ahead: for that it needs every rank's
flag of the next sum, and a rank raises that only after the kernel in which it read the last one.

A rank that never comes must not keep a GPU busy for ever. After LIMIT the wait ends, the numbers are wrong, and
1 + the missing rank stands in `error`, and in a word that the host can read while the GPU works. Later sums wait for
nobody. No more programs are launched than run at once, or two ranks could wait for blocks that neither has begun.

Reference: the sum in rank order, tests/kernels/test_kernel_push.py. Serves any number of rows that there is room for.
No multicast. Measured on two H200s as a probe, without residual and norm, in a CUDA graph: 5.1 us for [1, 7168], where
NCCL takes 12.1. Next: parallel/peers.py has the memory.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.activations import INTERPRETED
from saccade.kernels.launch import IS_INTERPRETED, begin, uses_pdl, wait
from saccade.kernels.residual import Input, PreparedResidual, store_residual
from saccade.kernels.types import Norm

PUSH_BLOCK = 512  # numbers of a block: a thread moves 16 bytes to each rank
PUSH_WARPS = 4
PUSH_THREADS = tl.constexpr(32 * PUSH_WARPS)
PROGRAMS_OF_ONE = 8  # that a multiprocessor runs at once, at up to 64 registers a thread
MOST_PROGRAMS = 4  # in the interpreter, so that programs take several blocks
# ns. Ranks that compile kernels come seconds apart. In the interpreter nobody comes while another waits.
LIMIT = tl.constexpr(0 if IS_INTERPRETED else 60_000_000_000)


class Peers(NamedTuple):
    """The memory of one rank's sums. All ranks launch the same sums in the same order."""

    rank: int
    ranks: int
    blocks: int  # that there is room for
    addresses: Tensor  # i64 [ranks + 1]: of each rank's shared memory, then of a word that the host reads
    counts: Tensor  # i32 [blocks]: of each block, how often it was summed
    error: Tensor  # i32 [1]: 0, or 1 + the rank that did not come; so is the host's word


class Phases(NamedTuple):
    """What a launch does; the interpreter runs rank after rank, and so phase after phase."""

    push: bool = True  # to all ranks, or to one
    add: bool = True  # in two steps: what came, for all
    take: bool = True


def count_shared_words(ranks: int, blocks: int) -> int:
    """32-bit words of shared memory that each rank needs for so many blocks. Must be zero at first."""
    return (2 * PUSH_BLOCK + 1) * (ranks + 1) * blocks


@triton.jit
def find_slot(base, slot, count, block, BLOCKS, RANKS: tl.constexpr, WIDTH: tl.constexpr):
    """Where block `block` of rank `slot` lies in the memory at `base`; slot RANKS is of finished sums."""
    place = ((count & 1) * (RANKS + 1) + slot).to(tl.int64) * BLOCKS + block
    return tl.multiple_of(base.to(tl.pointer_type(tl.float32)) + place * WIDTH, 16)


@triton.jit
def write_block(
    value, addresses, peer, slot, count, block, BLOCKS, RANKS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """f32 [WIDTH] as a block of rank `slot`, into the memory of `peer`."""
    place = find_slot(tl.load(addresses + peer), slot, count, block, BLOCKS, RANKS, WIDTH)
    tl.store(place + tl.arange(0, WIDTH), value)


@triton.jit
def find_flags(base, slot, block, BLOCKS, RANKS: tl.constexpr, WIDTH: tl.constexpr):
    """The flag of that block, behind all blocks of both halves; `base` and `slot` may be vectors."""
    start = base.to(tl.pointer_type(tl.int32))
    return start + ((2 * WIDTH * (RANKS + 1) + slot) * BLOCKS + block)


@triton.jit
def raise_flags(
    addresses, slot, count, block, BLOCKS, first, last, RANKS: tl.constexpr, UP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Tell the ranks from `first` to before `last` that all threads' writes of this block are there."""
    peer = tl.arange(0, UP)
    there = (peer >= first) & (peer < last)
    at = find_flags(tl.load(addresses + peer, mask=there, other=0), slot, block, BLOCKS, RANKS, WIDTH)
    tl.atomic_xchg(at, tl.zeros([UP], tl.int32) + count, mask=there, sem="release", scope="sys")


@triton.jit
def read_flags(flags):
    """Flags as they are now; what was written before they were raised is seen from now on."""
    if INTERPRETED:
        return tl.load(flags)
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [flags], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def read_clock():
    """Nanoseconds."""
    if INTERPRETED:
        return 0
    else:
        return tl.extra.cuda.globaltimer()


@triton.jit
def find_waiting(flags, blamed, count, start, limit):
    """0: all flags are raised; 1: not yet; 2 + i: it is too late for rank i.

    Every thread looks at a flag of its own, and all get the same answer: threads that leave a loop one by one would
    wait for each other for ever.
    """
    behind = read_flags(flags) - count < 0  # a rank may be one sum ahead, and counts begin anew after 2^31
    is_late = tl.zeros([PUSH_THREADS], tl.int64) + (read_clock() - start) >= limit
    return tl.max(tl.where(behind, tl.where(is_late, 2 + blamed, 1), 0), 0)


@triton.jit
def wait_for(
    mine, told, slot, blamed, count, block, error, limit, BLOCKS, RANKS: tl.constexpr, FLAGS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Until FLAGS flags are raised, those of `slot` and the slots after it; ranks from `blamed` on raise them."""
    which = tl.arange(0, PUSH_THREADS) % FLAGS
    flags = find_flags(mine, slot + which, block, BLOCKS, RANKS, WIDTH)
    start = read_clock()
    state = find_waiting(flags, blamed + which, count, start, limit)
    while state == 1:
        state = find_waiting(flags, blamed + which, count, start, limit)
    if state > 1:
        tl.store(error, state - 1)
        tl.store(told.to(tl.pointer_type(tl.int32)), state - 1)
    tl.debug_barrier()


@triton.jit
def read_block(part, block, pieces, columns, WIDTH: tl.constexpr):
    """A piece of a row of `part`, 0 behind the row's end."""
    column = block % pieces * WIDTH + tl.arange(0, WIDTH)
    row = (block // pieces).to(tl.int64) * columns
    return tl.load(part + row + column, mask=column < columns, other=0.0)


@triton.jit
def add_slots(mine, count, block, BLOCKS, RANKS: tl.constexpr, WIDTH: tl.constexpr):
    """f32 [WIDTH]: what all ranks wrote of a block, added in rank order."""
    lane = tl.arange(0, WIDTH)
    total = tl.load(find_slot(mine, 0, count, block, BLOCKS, RANKS, WIDTH) + lane, cache_modifier=".cg")
    for i in tl.static_range(1, RANKS):
        slot = find_slot(mine, i, count, block, BLOCKS, RANKS, WIDTH)
        total += tl.load(slot + lane, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["rank", "blocks"])
def sum_blocks(
    part, residual, gain, out, scaled, squares, addresses, counts, error, rank, blocks, columns, pieces, BLOCKS,
    RANKS: tl.constexpr, UP: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, RESIDUAL: tl.constexpr,
    PREPARED: tl.constexpr, PUSH: tl.constexpr, ADD: tl.constexpr, TAKE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = residual + the sum of every rank's `part`, rows of `columns` numbers in `pieces` blocks each."""
    begin(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, WIDTH)
    mine, told = tl.load(addresses + rank), tl.load(addresses + RANKS)  # not behind the flags: they empty the L1 cache
    wait(PDL)
    limit = tl.where(tl.load(error) == 0, LIMIT, 0)
    if PUSH:
        for block in range(program, blocks, programs):
            count = tl.load(counts + block) + 1
            value = read_block(part, block, pieces, columns, WIDTH)
            if STEPS == 1:
                for i in tl.static_range(RANKS):  # each rank begins with another one
                    peer = (rank + i) % RANKS
                    tl.store(
                        find_slot(tl.load(addresses + peer), rank, count, block, BLOCKS, RANKS, WIDTH) + lane, value
                    )
            else:
                owner = (block + block // programs) % RANKS
                write_block(value, addresses, owner, rank, count, block, BLOCKS, RANKS, WIDTH)
        tl.debug_barrier()
        for block in range(program, blocks, programs):
            count = tl.load(counts + block) + 1
            if STEPS == 1:
                raise_flags(addresses, rank, count, block, BLOCKS, 0, RANKS, RANKS, UP, WIDTH)
            else:
                owner = (block + block // programs) % RANKS
                raise_flags(addresses, rank, count, block, BLOCKS, owner, owner + 1, RANKS, UP, WIDTH)
    if ADD and STEPS == 2:
        for block in range(program, blocks, programs):
            if (block + block // programs) % RANKS == rank:
                count = tl.load(counts + block) + 1
                wait_for(mine, told, 0, 0, count, block, error, limit, BLOCKS, RANKS, RANKS, WIDTH)
                total = add_slots(mine, count, block, BLOCKS, RANKS, WIDTH)
                for i in tl.static_range(RANKS):
                    peer = (rank + i) % RANKS
                    tl.store(
                        find_slot(tl.load(addresses + peer), RANKS, count, block, BLOCKS, RANKS, WIDTH) + lane, total
                    )
                tl.debug_barrier()
                raise_flags(addresses, RANKS, count, block, BLOCKS, 0, RANKS, RANKS, UP, WIDTH)
    if TAKE:
        for block in range(program, blocks, programs):
            count = tl.load(counts + block) + 1
            piece, token = block % pieces, block // pieces
            column = piece * WIDTH + lane
            at = token.to(tl.int64) * columns
            if RESIDUAL:  # asked for before the flags are: behind them it would be waited for
                before = tl.load(residual + at + column, mask=column < columns, other=0.0)
            if PREPARED:
                gains = tl.load(gain + column, mask=column < columns, other=0.0)
            if STEPS == 1:
                wait_for(mine, told, 0, 0, count, block, error, limit, BLOCKS, RANKS, RANKS, WIDTH)
                y = add_slots(mine, count, block, BLOCKS, RANKS, WIDTH)
            else:
                owner = (block + block // programs) % RANKS
                wait_for(mine, told, RANKS, owner, count, block, error, limit, BLOCKS, RANKS, 1, WIDTH)
                slot = find_slot(mine, RANKS, count, block, BLOCKS, RANKS, WIDTH)
                y = tl.load(slot + lane, cache_modifier=".cg")
            if RESIDUAL:
                y = before + y
            if PREPARED:
                store_residual(y, out + at, column, columns, gains, scaled + at, squares + block)
            else:
                tl.store(out + at + column, y, mask=column < columns)
            tl.store(counts + block, count)


@triton.jit(do_not_specialize=["rank", "blocks"])
def gather_blocks(
    part, out, addresses, counts, error, rank, blocks, columns, total, pieces, BLOCKS, RANKS: tl.constexpr,
    UP: tl.constexpr, WIDTH: tl.constexpr, PUSH: tl.constexpr, TAKE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, total]: every rank's `part` [rows, its share of total], side by side."""
    begin(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, WIDTH)
    mine, told = tl.load(addresses + rank), tl.load(addresses + RANKS)  # not behind the flags: they empty the L1 cache
    wait(PDL)
    limit = tl.where(tl.load(error) == 0, LIMIT, 0)
    if PUSH:
        for block in range(program, blocks, programs):
            count = tl.load(counts + block) + 1
            value = read_block(part, block, pieces, columns, WIDTH)
            for i in tl.static_range(RANKS):
                peer = (rank + i) % RANKS
                write_block(value, addresses, peer, rank, count, block, BLOCKS, RANKS, WIDTH)
        tl.debug_barrier()
        for block in range(program, blocks, programs):
            count = tl.load(counts + block) + 1
            raise_flags(addresses, rank, count, block, BLOCKS, 0, RANKS, RANKS, UP, WIDTH)
    if TAKE:
        for block in range(program, blocks, programs):
            count = tl.load(counts + block) + 1
            column = block % pieces * WIDTH + lane
            row = (block // pieces).to(tl.int64) * total
            wait_for(mine, told, 0, 0, count, block, error, limit, BLOCKS, RANKS, RANKS, WIDTH)
            for i in tl.static_range(RANKS):
                slot = find_slot(mine, i, count, block, BLOCKS, RANKS, WIDTH)
                value = tl.load(slot + lane, cache_modifier=".cg")
                first, end = total * i // RANKS, total * (i + 1) // RANKS  # as models/parameters.py shares
                tl.store(out + row + first + column, value, mask=column < end - first)
            tl.store(counts + block, count)


def count_blocks(rows: int, columns: int) -> int:
    """Of 512 numbers, that a sum of so many rows takes up."""
    return rows * triton.cdiv(columns, PUSH_BLOCK)


def push_sum(
    peers: Peers,
    part: Tensor,
    residual: Tensor | None = None,
    following: Norm | None = None,
    steps: int = 1,
    phases: Phases | None = None,
) -> Input:
    """residual + the sum of every rank's `part` f32 [T, k]; prepared for the norm `following`, if there is one."""
    phases = phases or Phases()
    rows, columns = part.shape
    pieces, blocks = triton.cdiv(columns, PUSH_BLOCK), count_blocks(rows, columns)
    assert part.is_contiguous() and blocks <= peers.blocks, f"{tuple(part.shape)}: room for {peers.blocks} blocks"
    assert residual is None or residual.is_contiguous(), "a residual like the result"
    out, uses = torch.empty_like(part), uses_pdl(part)
    scaled, squares = (out, out) if following is None else (torch.empty_like(out), out.new_empty(rows, pieces))
    sum_blocks[count_programs(part, blocks),](
        part, out if residual is None else residual, out if following is None else following.weight, out, scaled,
        squares, peers.addresses, peers.counts, peers.error, peers.rank, blocks, columns, pieces, peers.blocks,
        RANKS=peers.ranks, UP=triton.next_power_of_2(peers.ranks), WIDTH=PUSH_BLOCK, STEPS=steps,
        RESIDUAL=residual is not None, PREPARED=following is not None, PUSH=phases.push, ADD=phases.add,
        TAKE=phases.take, PDL=uses, num_warps=PUSH_WARPS, launch_pdl=uses,
    )  # fmt: skip
    return out if following is None else PreparedResidual(out, scaled, squares)


def push_columns(peers: Peers, part: Tensor, total: int, phases: Phases | None = None) -> Tensor:
    """f32 [T, total]: every rank's `part` [T, its share of total], side by side."""
    phases = phases or Phases()
    rows, columns = part.shape
    pieces = triton.cdiv(triton.cdiv(total, peers.ranks), PUSH_BLOCK)  # of the largest share
    blocks = rows * pieces
    assert part.is_contiguous() and blocks <= peers.blocks, f"{tuple(part.shape)}: room for {peers.blocks} blocks"
    out, uses = part.new_empty(rows, total), uses_pdl(part)
    gather_blocks[count_programs(part, blocks),](
        part, out, peers.addresses, peers.counts, peers.error, peers.rank, blocks, columns, total, pieces, peers.blocks,
        RANKS=peers.ranks, UP=triton.next_power_of_2(peers.ranks), WIDTH=PUSH_BLOCK, PUSH=phases.push, TAKE=phases.take,
        PDL=uses, num_warps=PUSH_WARPS, launch_pdl=uses,
    )  # fmt: skip
    return out


def count_programs(part: Tensor, blocks: int) -> int:
    """As many as there are blocks, if all run at once. The same on all ranks: a block's owner depends on it."""
    if IS_INTERPRETED or part.device.type != "cuda":
        return min(blocks, MOST_PROGRAMS)
    return min(blocks, PROGRAMS_OF_ONE * count_multiprocessors(part.device.index))


@functools.cache
def count_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
