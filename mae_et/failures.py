"""Failures of the machine, told in a sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mae_et.errors import Interrupted, RunFailed


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Turn exhausted memory and dead loader processes into a sentence that says what to do.

    Raises:
        RunFailed: memory ran out, or a loader process died.
    """
    try:
        yield
    except (RunFailed, Interrupted):
        raise
    except torch.OutOfMemoryError:
        raise RunFailed("out of GPU memory: lower efficiency.micro_batch (batch_size)") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunFailed(
            "a loader process died, as it does when memory or /dev/shm runs out: lower "
            "efficiency.workers (workers) or efficiency.micro_batch (batch_size)"
        ) from error
