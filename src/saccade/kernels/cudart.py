"""Calls of CUDA's runtime that torch has no name for: of its own library, which is loaded already.

Errors are RuntimeErrors that name the call. Next: parallel/peers.py, engine/graphs.py.
"""

from ctypes import CDLL, Structure, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

import torch

LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: memory of another GPU can be reached once it is opened


class IpcHandle(Structure):
    """cudaIpcMemHandle_t: what another process opens memory by."""

    _fields_ = [("data", c_char * 64)]


def count_nodes(graph: torch.cuda.CUDAGraph) -> int:
    """Launches in a captured graph."""
    count = c_size_t(0)
    _call("cudaGraphGetNodes", c_void_p(graph.raw_cuda_graph()), None, byref(count))
    return count.value


def allocate_zeros(size: int) -> int:
    """The address of `size` bytes of zeros on the current device, beside torch's allocator: other processes can open
    all of it."""
    place = c_void_p()
    _call("cudaMalloc", byref(place), c_size_t(size))
    _call("cudaMemset", place, c_int(0), c_size_t(size))
    torch.cuda.synchronize()
    return place.value or 0


def free(address: int) -> None:
    """Give `allocate_zeros`' memory back, when nothing on the device uses it any more."""
    _call("cudaFree", c_void_p(address))


def make_handle(address: int) -> bytes:
    """By which another process of this machine opens the memory at `address`."""
    handle = IpcHandle()
    _call("cudaIpcGetMemHandle", byref(handle), c_void_p(address))
    return bytes(handle)


def open_handle(handle: bytes) -> int:
    """The address at which the current device sees another process's memory."""
    place = c_void_p()
    _call("cudaIpcOpenMemHandle", byref(place), IpcHandle.from_buffer_copy(handle), c_uint(LAZY_PEER_ACCESS))
    return place.value or 0


def close_handle(address: int) -> None:
    """Let go of what `open_handle` opened."""
    _call("cudaIpcCloseMemHandle", c_void_p(address))


@cache
def _load() -> CDLL:
    major = (torch.version.cuda or "").partition(".")[0]
    library = CDLL(f"libcudart.so.{major}")
    library.cudaGetErrorString.restype = c_char_p
    return library


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_load(), name)(*arguments)
    if code:
        _load().cudaGetLastError()  # or the next call of torch would find it
        raise RuntimeError(f"{name}: {_load().cudaGetErrorString(code).decode()}")
