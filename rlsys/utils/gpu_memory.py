"""Memory of a process on a GPU that it shares with another process. Not run on a GPU yet."""

from __future__ import annotations


def limit(device: str, share: float) -> None:
    """Let torch allocate at most this share of the GPU's memory."""
    if device == "cuda" and share < 1:
        import torch

        torch.cuda.set_per_process_memory_fraction(share)


def give_back(device: str, share: float) -> None:
    """Release torch's cached memory: other processes cannot use it, and an engine that wakes up needs it."""
    if device == "cuda" and share < 1:
        import torch

        torch.cuda.empty_cache()


def unused_bytes() -> int:
    """Bytes that torch may still allocate in this process on the current GPU."""
    import torch

    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, min(free + reserved, allowed) - allocated)
