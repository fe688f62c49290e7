"""Ranks over a process group of torch.distributed: gloo on CPUs, NCCL on GPUs.

Sums are made here, in f32 and in rank order, because no backend promises an order: each rank sums the same numbers in
the same way, so all have the same bits. The group is an argument; nothing here asks for torch's default one.
Next: ranks.py says what is asked of it.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from saccade.models.parameters import Layout, share

# From this size on, each rank sums one block of the message and sends it to all: 2 * (n - 1) / n messages' bytes in
# place of n - 1. For two ranks both are one message.
LARGE_MESSAGE = 1 << 17


@dataclass
class Traffic:
    """What a rank has sent to others."""

    messages: int = 0  # collectives
    bytes: int = 0

    def note(self, sent: int) -> None:
        self.messages += 1
        self.bytes += sent


def join_gloo(store: Store, layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    """A group on CPUs, of the processes that meet in `store`. It is nobody's default: torch keeps no word of it."""
    group = dist.ProcessGroup(store, layout.rank, layout.tp)
    backend = dist.ProcessGroupGloo(store, layout.rank, layout.tp, timeout)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


class DistributedRanks:
    """The ranks of a process group, whose rank r is the layout's rank r."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
        """`device`: where messages are when they are sent, the CPU for gloo, a GPU for NCCL. ValueError unless the
        group is of the layout's size and this process its rank."""
        if (group.size(), group.rank()) != (layout.tp, layout.rank):
            found = f"rank {group.rank()} of {group.size()}"
            raise ValueError(f"a group of {layout.tp} and rank {layout.rank} in it were expected, found {found}")
        self.layout, self.traffic = layout, Traffic()
        self._group, self._device = group, torch.device(device)

    def add_up(self, part: Tensor) -> Tensor:
        """See `Ranks`. Numbers of any dtype are added as f32 [...]."""
        numbers = part.to(self._device, torch.float32).contiguous()
        is_long = self.layout.tp > 2 and numbers.nbytes >= LARGE_MESSAGE
        return (self._add_blocks(numbers) if is_long else self._add_whole(numbers)).to(part.device)

    def _add_whole(self, numbers: Tensor) -> Tensor:
        return add_in_order(self._gather(numbers))

    def _add_blocks(self, numbers: Tensor) -> Tensor:
        """Rank r sums block r of all; then all get all blocks."""
        tp = self.layout.tp
        width = -(-numbers.numel() // tp)
        mine = numbers.new_zeros(tp * width)
        mine[: numbers.numel()] = numbers.flatten()
        blocks = torch.empty_like(mine)  # block `rank` of every rank
        dist.all_to_all_single(blocks, mine, group=self._group)
        self.traffic.note((tp - 1) * width * mine.itemsize)
        sums = self._gather(add_in_order(list(blocks.split(width))))
        return torch.cat(sums)[: numbers.numel()].view(numbers.shape)

    def gather(self, part: Tensor, width: int) -> Tensor:
        tp = self.layout.tp
        spans = [share(width, tp, rank) for rank in range(tp)]
        widest = max(last - first for first, last in spans)
        padded = part.new_zeros(len(part), widest)
        padded[:, : part.shape[1]] = part
        parts = self._gather(padded.to(self._device))
        columns = [x[:, : last - first] for x, (first, last) in zip(parts, spans, strict=True)]
        return torch.cat(columns, 1).to(part.device)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Write what rank `source` holds in `tensor` over it, on every rank. All bring the same shape and dtype."""
        held = tensor.to(self._device).contiguous()
        dist.broadcast(held.view(-1).view(torch.uint8), group_src=source, group=self._group)
        if source == self.layout.rank:
            self.traffic.note((self.layout.tp - 1) * held.nbytes)
        elif held is not tensor:
            tensor.copy_(held)

    def collect(self, text: str) -> list[str]:
        """Every rank's `text`, in rank order."""
        data = list(text.encode())
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)], device=self._device))]
        longest = max(sizes)
        if longest == 0:
            return [""] * len(sizes)
        padded = torch.tensor(data + [0] * (longest - len(data)), dtype=torch.uint8, device=self._device)
        parts = self._gather(padded)
        return [bytes(x[:size].tolist()).decode() for x, size in zip(parts, sizes, strict=True)]

    def check(self) -> None:
        """See `Ranks`: here a wait that ends in vain raises by itself."""

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor; all have one shape."""
        parts = list(mine.new_empty(self.layout.tp, *mine.shape).unbind(0))
        dist.all_gather(parts, mine.contiguous(), group=self._group)
        self.traffic.note((self.layout.tp - 1) * mine.nbytes)
        return parts


def add_in_order(parts: list[Tensor]) -> Tensor:
    """((parts[0] + parts[1]) + parts[2]) + ..."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
