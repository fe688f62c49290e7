"""Memory that the GPUs of one host share, for sums of small messages (kernels/collective/push.py).

torch's symmetric memory: each rank allocates as much as the others, and maps theirs. NVLink multicast stays off, here
too: this needs none, and a program that ends badly with it can put a host's GPUs out of service. Knows no operations.
Next: device.py.
"""

import os
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, _register_process_group, _SymmetricMemory

from saccade.kernels.collective.push import Peers, count_shared_words
from saccade.models.parameters import Layout

OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # "1": several ranks on one GPU, for tests
NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}
_numbers = count()  # of groups of this process: each allocation has a group of its own


class SharedMemory:
    """This rank's, mapped by all others and with all others' mapped. It lives as long as this object does."""

    def __init__(self, store: Store, layout: Layout, device: torch.device, blocks: int) -> None:
        """All ranks of `layout` do this at the same time; `store` is where they meet. `blocks`: of the largest sum, see
        `count_blocks` in push.py."""
        os.environ |= NO_MULTICAST
        name = f"saccade-{next(_numbers)}"
        meeting = PrefixStore(name, store)
        self._group = dist.ProcessGroup(meeting, layout.rank, layout.tp)  # torch keeps none alive
        _SymmetricMemory.set_group_info(name, layout.rank, layout.tp, meeting)  # where one version of torch looks
        _register_process_group(name, self._group)  # type: ignore[arg-type]  # and another
        with torch.cuda.device(device):
            words = count_shared_words(layout.tp, blocks)
            self._memory: Tensor = _SymmetricMemory.empty_strided_p2p((words,), (1,), torch.int32, device, name)
            self._memory.zero_()
            torch.cuda.synchronize(device)
            self._handle = _SymmetricMemory.rendezvous(self._memory, name)
            self._told = torch.zeros(1, dtype=torch.int32).pin_memory()
            addresses = torch.tensor([*self._handle.buffer_ptrs, self._told.data_ptr()], device=device)
            counts, error = (torch.zeros(n, dtype=torch.int32, device=device) for n in (blocks, 1))
        self.peers = Peers(layout.rank, layout.tp, blocks, addresses, counts, error)

    def find_missing(self) -> int | None:
        """The rank that a sum waited for in vain; None while all come. Waits for nothing: read it behind the tokens."""
        return int(self._told) - 1 if int(self._told) else None
