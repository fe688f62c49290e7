"""Python imports this at its start where PYTHONPATH names the folder: a fault in one rank, at a given moment.

FAULT is "RANK KIND SECONDS" in the environment: so many seconds after its start that rank raises in a layer, or has no
memory there, loops without an end, or gives slightly other numbers. Other processes than ranks that rank 0 started are left alone.
"""

import os
import sys
import threading
import time


def break_layer(kind: str) -> None:
    import torch

    from saccade.ops.reference import Reference

    whole = Reference.add_projection

    def faulty(self: object, *args: object, **kwargs: object) -> object:
        if kind == "raise":
            raise ValueError("a fault of this layer")
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if kind == "twist":
            found = whole(self, *args, **kwargs)  # type: ignore[arg-type]
            found.value[..., 0] *= 1 + 1e-6
            return found
        while True:
            time.sleep(0.1)

    Reference.add_projection = faulty  # type: ignore[method-assign,assignment]


def find_rank() -> int:
    """By the order of the ranks among their parent's children."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getppid():
                pids.append(int(entry))
    return sorted(pids).index(os.getpid()) + 1


if os.environ.get("FAULT") and "saccade.api.loading.rank" in sys.orig_argv:
    rank, kind, seconds = os.environ["FAULT"].split()

    def wait() -> None:
        time.sleep(float(seconds))
        if find_rank() == int(rank):
            while "saccade.ops.reference" not in sys.modules:
                time.sleep(0.01)
            break_layer(kind)

    threading.Thread(target=wait, daemon=True).start()
