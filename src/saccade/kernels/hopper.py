"""What kernels in Gluon for a Hopper share: other warps copy tiles while these multiply.

A copy keeps the warp that asks for it until the memory system takes it. 74 kB a tile take as long to ask for as to
multiply, and one warp does both one after the other: so copies have warps of their own. Copied tiles go round in a ring
of places. A place has two barriers: `full`, at which the threads that copy arrive with their copies, and `free`, at
which each group of warps that multiply arrives once.

ptxas makes products wait for one another if anything between the first and the last of them that are under way touches
their registers, and says so only in a remark (`ptxas -v`). So none is under way from one pass of a loop to the next,
and what the next pass multiplies out of registers goes through the wait at the end of this one.

What the interpreter cannot run: each such kernel stands beside one in Triton, its fallback and its oracle.
Next: attention/sparse_hopper.py, attention/masked_hopper.py, indexer/scores_hopper.py.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from saccade.kernels.launch import find_arch

HOPPER = 90  # capability 9.0, whose products read shared memory
GROUP_WARPS, COPY_WARPS = 4, 4  # that multiply together; that copy
COPY_THREADS = 32 * COPY_WARPS
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # Triton 3.9; 3.6


def is_hopper(x: Tensor) -> bool:
    """Whether kernels for a Hopper run where x lies."""
    return find_arch(x) == HOPPER


@gluon.jit
def make_barriers(PLACES: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each place of a ring, at which as many arrive."""
    barriers = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def find_turn(i, PLACES: gl.constexpr):
    """Where tile i lies in a ring, and the phase of its barriers."""
    return i % PLACES, (i // PLACES) & 1


@gluon.jit
def copy_rows(at, place, ROWS: gl.constexpr, WIDTH: gl.constexpr, VECTOR: gl.constexpr):
    """Ask for ROWS x WIDTH numbers that lie side by side from `at` on; VECTOR of them are 16 bytes."""
    LANES: gl.constexpr = WIDTH // VECTOR
    LOADED: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOADED)), 1)
    column = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LOADED)), 0)
    load_async(place, at + (row * WIDTH + column))


@gluon.jit
def split_bf16(x):
    """f32 x as high and low BF16 numbers."""
    high = x.to(gl.bfloat16)
    return high, (x - high.to(gl.float32)).to(gl.bfloat16)
