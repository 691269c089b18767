"""What a device says when it is full or lost, as errors that name the cure."""

from collections.abc import Iterator
from contextlib import contextmanager

from bakery.errors import DeviceError, first_line


def is_full(error: BaseException) -> bool:
    """Whether less work at a time could cure it."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and should_reduce_batch_size(error))


def free_memory() -> None:
    """Give back what failed work has left allocated; its exception must be gone by now, since it holds the tensors."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


@contextmanager
def device_errors(cure: str) -> Iterator[None]:
    """Raises DeviceError where a device is full, with the `cure`, or lost: after that a process gets no more of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch

        if is_full(error):
            raise DeviceError(f"out of memory ({first_line(error)}); {cure}") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(
                f"the device is lost ({first_line(error)}); what was written is kept, run the same command again to go "
                f"on (distill: with --resume)"
            ) from error
        raise
