"""Where the engine computes: a device, its stream and its number formats, whatever thread calls. Knows no request."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch


def on(device: torch.device | str) -> AbstractContextManager[object]:
    """Computing there as the engine does, whatever the thread that calls is set to: these settings are a thread's own.

    A CUDA device becomes the current one: Triton launches its kernels there, wherever their tensors are. Work goes to
    its default stream, behind what this thread's stream has been given: steps of all threads are in order. Numbers are
    not rounded by a trainer's autocast.
    """
    kind = torch.device(device).type
    return _on(kind, device) if kind == "cuda" or torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def _on(kind: str, device: torch.device | str) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if kind == "cuda":
            stack.enter_context(torch.cuda.device(device))
            here, ours = torch.cuda.current_stream(), torch.cuda.default_stream()
            if here != ours:
                ours.wait_stream(here)
                stack.callback(here.wait_stream, ours)
                stack.enter_context(torch.cuda.stream(ours))
        yield
