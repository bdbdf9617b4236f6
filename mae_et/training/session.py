"""What the spines of pre-training and of classifiers share: how a run begins, reports and ends."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mae_et.checkpoints.listing import list_checkpoints
from mae_et.checkpoints.store import newest_checkpoint, rename_damaged_after
from mae_et.config.files import to_yaml
from mae_et.config.resume import check_same_run
from mae_et.config.schema import EfficiencyConfig
from mae_et.curriculum.table import COMPUTE_UNITS
from mae_et.errors import RunFailed, UserError
from mae_et.io.atomic import remove_leftovers, write_text_atomically
from mae_et.io.lock import check_writable, sole_writer
from mae_et.io.metrics_file import Row
from mae_et.io.plain_files import read_mapping
from mae_et.monitoring.divergence import diagnosis
from mae_et.monitoring.logger import RunLogger
from mae_et.runtime import distributed
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.signals import StopFlag, stop_signals
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.runtime.watchdog import hang_watchdog
from mae_et.training.metrics import summarise_stages
from mae_et.training.run import Run


@contextmanager
def distributed_session(
    efficiency: EfficiencyConfig,
) -> Iterator[tuple[DistributedContext, StopFlag]]:
    """Join the other processes, and be ready for signals, a hang and failures of the machine.

    Raises:
        UserError: the device is not there.
        RunFailed: memory or the disk ran out, or another process died.
    """
    patience = efficiency.step_timeout
    world = distributed.initialize(efficiency.device, patience)
    try:
        with explain_system_errors(), hang_watchdog(patience), stop_signals() as stopped:
            yield world, stopped
    finally:
        distributed.shutdown(world)


def find_checkpoint(config: Any, world: DistributedContext) -> tuple[dict[str, Any] | None, bool]:
    """Return the newest checkpoint of a run's folder, and whether the run is finished.

    Raises:
        UserError: the folder holds a run of other numbers, or checkpoints of which none loads.
        RunFailed: processes see different checkpoints.
    """
    folder = config.output.dir
    checkpoints = folder / "checkpoints"
    saved = newest_checkpoint(checkpoints)
    finished = _is_finished(folder, saved)
    if saved is None and not finished and (damaged := list_checkpoints(checkpoints)):
        # Beginning anew would throw away the record, and days of work, without being asked to.
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {checkpoints} loads, and nothing was "
            "changed: put a copy of one back, or delete them to begin at step 0"
        )
    check_same_run(config, saved, finished)
    if not distributed.all_ranks_equal(saved["step"] if saved else 0, world):
        raise RunFailed(f"processes see different checkpoints in {folder}; start again")
    return saved, finished


def _is_finished(folder: Path, saved: dict[str, Any] | None) -> bool:
    """Return whether a run has its final figures; damaged ones are written again from its state.

    Raises:
        UserError: they are damaged, and there is no state.
    """
    path = folder / "results.json"
    if not path.exists():
        return False
    try:
        read_mapping(path)
    except UserError as error:
        if saved is None:
            raise
        warnings.warn(f"{error}; it is written again", stacklevel=2)
        return False
    return True


@contextmanager
def run_records(run: Run, files: Mapping[str, str] | None = None) -> Iterator[RunLogger | None]:
    """Keep other writers out of the run's folder, write down what is run, and open its monitor.

    Only the main process writes; the others get None.

    Args:
        run: the run.
        files: what else is written down, by name.

    Raises:
        UserError: another process writes to the folder, or has gone on with the run; or nobody can
            write checkpoints there.
    """
    if not run.world.is_main:
        yield None
        return
    folder = run.config.output.dir
    with sole_writer(folder):
        check_writable(folder / "checkpoints")
        for place in (folder, folder / "reconstructions"):
            remove_leftovers(place)
        rename_damaged_after(folder / "checkpoints", run.state.step)
        plan = json.dumps(run.plan.to_dict(), indent=1)
        texts = {"config.yaml": to_yaml(run.config), "plan.json": plan, **(files or {})}
        for name, text in texts.items():
            write_text_atomically(folder / name, text)
        with closing(RunLogger(run.config, run.plan, run.state.step)) as monitor:
            if run.unread is not None:
                run.unread.write()
            yield monitor


def write_results(run: Run, monitor: RunLogger, rows: list[Row], figures: dict[str, Any]) -> None:
    """Leave the final figures: written last, for `results.json` says that all is done.

    Args:
        run: the run.
        monitor: what it reports to.
        rows: its metrics.
        figures: what its kind of run ends with, beside what every run does.
    """
    plan, folder = run.plan, run.config.output.dir
    results = {
        **figures,
        "steps": plan.steps,
        "equivalent_epochs": plan.equivalent_epochs,
        "compute": plan.compute,
        "compute_unit": COMPUTE_UNITS[run.config.curriculum.cost],
        "training_seconds": run.state.seconds,
        "stages": summarise_stages(rows, plan),
        **diagnosis(rows),
    }
    monitor.log_results(results)
    monitor.flush()
    write_text_atomically(folder / "results.json", json.dumps(results, indent=1))
