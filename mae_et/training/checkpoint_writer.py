"""Write a run's checkpoints in a thread, while training continues."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from mae_et.checkpoints.store import prune_checkpoints, save_checkpoint
from mae_et.config.files import to_record
from mae_et.errors import RunFailed, one_line
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.console import say
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.training.host_copy import HostCopy
from mae_et.training.nonfinite import check_state
from mae_et.training.run import Run


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time and in the order of their steps.

    Every rank has one, because the state may be sharded; only the main rank's writes. Leaving the
    block waits for a write in progress, also after an error or a second SIGINT.

    A process may be forked (loader workers) while a checkpoint is written: outside of system calls
    and of copies of memory, the thread holds the GIL, so a child inherits no lock that it needs.
    """

    def __init__(self, run: Run, logger: RunLogger | None):
        self.run, self.logger = run, logger
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        failure = None if self._written is None else self._written.exception()
        if failure is None or failure is error:
            return
        if error is None:
            raise failure
        say(f"the last checkpoint was not written: {one_line(failure)}")

    @property
    def failed(self) -> bool:
        """Whether a write has failed; `wait` and `save` raise its error."""
        written = self._written
        return written is not None and written.done() and written.exception() is not None

    def save(self, waits: bool) -> None:
        """Flush earlier rows, write a checkpoint, and delete superseded ones; a collective.

        With `waits`, it returns when the checkpoint is on disk. Otherwise training waits for a copy
        of the state in host memory, if there is room for one. A state that is not finite raises
        `Diverged`, and a checkpoint that could not be written, this or the last, on all ranks.
        """
        self.wait()
        run, logger = self.run, self.logger
        check_state(run)
        state = run.state.to_dict()
        if logger is not None:
            logger.flush()
            live = set(_addresses(run)) if run.state.sharded else None
            copied = None if waits else self._host.take(state, live)
            waits = copied is None
            state = state if copied is None else copied
            self._written = self._thread.submit(_write, run, state, logger.check_lock)
        if distributed.any_rank(waits, run.world):
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; a collective."""
        with fail_together(self.run.world):
            distributed.wait_for_main(self._written, self.run.world)
        self._written = None


def _write(run: Run, state: dict[str, Any], check_lock: Callable[[], None]) -> None:
    """Write a checkpoint of a state, and delete superseded ones; raise `RunFailed` if it fails."""
    output, plan = run.config.output, run.plan
    folder = output.dir / "checkpoints"
    try:
        with explain_system_errors(writes=True):
            save_checkpoint(folder, state, to_record(run.config), plan.to_dict(), run.provenance)
            prune_checkpoints(folder, output.keep_last, run.keeps)
    except RunFailed:
        check_lock()  # has a better reason if the run folder is gone
        raise


def _addresses(run: Run) -> Iterator[int]:
    """Yield the addresses of this rank's parts of a sharded state.

    Gathered tensors are new; the others (buffers, the optimizer's step counts) are the run's own.
    """
    state = run.state
    values = [*state.model.state_dict().values()]
    values += [each for moments in state.optimizer.state.values() for each in moments.values()]
    for value in values:
        local = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(local, Tensor):
            yield local.untyped_storage().data_ptr()
