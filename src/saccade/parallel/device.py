"""Ranks that are GPUs: small messages by push over memory that a host's GPUs share, all others by NCCL.

Push waits for one flight over NVLink where NCCL starts a ring, adds what follows the sum in the same launch, and stands
in CUDA graphs. NCCL carries what is long, and everything between hosts. There too the sum is made here: NCCL's own
all-reduce adds in an order of its choice, which changes with the size of the message. Block r of the message goes to
rank r, is added in rank order, and goes to all: as many bytes as in a ring (distributed.py).
Next: peers.py, kernels/collective/push.py.
"""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from saccade.errors import RankError
from saccade.kernels.collective.push import Peers, count_blocks, push_columns, push_sum
from saccade.kernels.residual import Input, get_values, prepare_residual
from saccade.kernels.types import GEMV_TOKENS, Norm
from saccade.models.parameters import Layout
from saccade.parallel.distributed import DistributedRanks, join_gloo
from saccade.parallel.peers import SharedMemory

MOST_BLOCKS = 3584  # of a push: 256 rows of 7,168 numbers; 132 MB for eight ranks
# From so many bytes on that are not sent twice, a sum in two steps is faster: the second wait takes some 2.5 us, in
# which NVLink carries 1 MB.
TWO_STEPS_SAVE = 1 << 20
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}  # see peers.py


class DeviceRanks(DistributedRanks):
    """This rank on its GPU. All ranks have the same `memory`, or none has."""

    def __init__(
        self, hosts: DistributedRanks, group: dist.ProcessGroup, device: torch.device | str, memory: SharedMemory | None
    ) -> None:
        """`hosts`: the same ranks over gloo, for what is not on GPUs. `group`: for long messages, on `device`: NCCL's
        GPU, or "cpu"."""
        super().__init__(hosts.layout, group, device)
        self.hosts, self.group, self.device, self.memory = hosts, group, torch.device(device), memory

    def add_up(self, part: Tensor) -> Tensor:
        peers = self._find_room(part, part.shape[-1])
        if peers is None:
            return super().add_up(part)
        return get_values(push_sum(peers, part.contiguous(), steps=self._count_steps(part)))

    def add_into(self, residual: Tensor | None, part: Tensor, following: Norm) -> Input:
        """residual + the sum of every rank's `part`, as readers with the norm `following` take it: in one launch, if
        the message is short."""
        peers = self._find_room(part, part.shape[-1])
        if peers is None:
            total = super().add_up(part)
            return prepare_residual(total if residual is None else residual + total, following)
        norm = following if len(part) <= GEMV_TOKENS else None
        self.traffic.note(part.nbytes * (self.layout.tp - 1))
        return push_sum(peers, part.contiguous(), residual, norm, self._count_steps(part))

    def gather(self, part: Tensor, width: int) -> Tensor:
        peers = self._find_room(part, -(-width // self.layout.tp))
        return super().gather(part, width) if peers is None else push_columns(peers, part.contiguous(), width)

    def check(self) -> None:
        missing = None if self.memory is None else self.memory.find_missing()
        if missing is not None:
            raise RankError(f"rank {missing} did not come to a sum within 60 s: its process has ended or hangs")

    def collect(self, text: str) -> list[str]:
        return self.hosts.collect(text)

    def close(self) -> None:
        """When no rank sends any more: NCCL's threads end, which at the end of a process would wait for other ranks."""
        torch.cuda.synchronize()
        if self.device.type == "cuda":
            self.group.abort()

    def has_room(self, part: Tensor, columns: int) -> bool:
        """Whether a message of so many columns is pushed."""
        return self._find_room(part, columns) is not None

    def _find_room(self, part: Tensor, columns: int) -> Peers | None:
        """The memory to push a message of `columns` columns; None if it goes another way."""
        is_some = part.ndim == 2 and part.numel() > 0 and part.dtype == torch.float32 and part.is_cuda
        if self.memory is None or not is_some or count_blocks(len(part), columns) > self.memory.peers.blocks:
            return None
        return self.memory.peers

    def _count_steps(self, part: Tensor) -> int:
        tp = self.layout.tp
        return 2 if part.nbytes * (tp - 1) * (tp - 2) / tp > TWO_STEPS_SAVE else 1


def join_nccl(store: Store, layout: Layout, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """A group on GPUs, of the processes that meet in `store`; see `join_gloo`."""
    group = dist.ProcessGroup(store, layout.rank, layout.tp)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(PrefixStore("nccl", store), layout.rank, layout.tp, options)
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, backend)
    with torch.cuda.device(device):  # connected now, not within a graph
        first = torch.zeros(layout.tp, device=device)
        dist.all_to_all_single(torch.empty_like(first), first, group=group)
        dist.all_gather(list(torch.empty(layout.tp, 1, device=device).unbind()), first[:1], group=group)
        torch.cuda.synchronize(device)
    return group


def join_devices(
    store: Store, layout: Layout, device: torch.device, timeout: timedelta, blocks: int = MOST_BLOCKS
) -> DeviceRanks:
    """This rank on `device`, when all have come. Ranks of one host push messages of up to `blocks` blocks, if their
    GPUs reach each other. Several may be on one GPU, for tests; then long messages go over the CPU, because
    NCCL refuses."""
    os.environ |= NO_MULTICAST
    torch.cuda.set_device(device)
    hosts = join_gloo(PrefixStore("gloo", store), layout, timeout)
    control = DistributedRanks(layout, hosts)
    places = control.collect(f"{device.index} {socket.gethostname()}")
    is_one_host = len({place.partition(" ")[2] for place in places}) == 1
    others = [int(place.partition(" ")[0]) for place in places]
    is_near = is_one_host and all(
        other == device.index or torch.cuda.can_device_access_peer(device.index, other) for other in others
    )
    memory = None
    if all(text == "yes" for text in control.collect("yes" if is_near else "no")):
        memory = SharedMemory(control.collect, layout, device, blocks)
    if len(set(places)) < layout.tp:
        return DeviceRanks(control, hosts, "cpu", memory)
    return DeviceRanks(control, join_nccl(store, layout, device, timeout), device, memory)
