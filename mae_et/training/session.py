"""What all kinds of runs share, from joining the ranks to the final figures."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mae_et.checkpoints.store import prune_checkpoints, rename_damaged_after
from mae_et.config.efficiency import ProcessConfig
from mae_et.config.files import to_yaml
from mae_et.config.schema import RunConfig
from mae_et.curriculum.table import COMPUTE_UNITS
from mae_et.data.bad_images import BadImages
from mae_et.data.cores import compute_threads, worker_count
from mae_et.data.device.choose_decoder import choose_decoder
from mae_et.data.loader import training_batches
from mae_et.errors import Interrupted
from mae_et.io.atomic import remove_leftovers, write_text_atomically
from mae_et.io.lock import check_writable, sole_writer
from mae_et.io.metrics_file import read_metrics
from mae_et.io.plain_files import append_line
from mae_et.monitoring.divergence import diagnosis
from mae_et.monitoring.log_file import log_file
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.stages import summarise_stages
from mae_et.runtime import distributed
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.placement import check_own_gpus
from mae_et.runtime.signals import StopFlag, stop_signals
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.runtime.watchdog import hang_watchdog, limit_exit
from mae_et.training.checkpoint_writer import CheckpointWriter
from mae_et.training.environment import ENVIRONMENT, describe_environment
from mae_et.training.loop import Step, train
from mae_et.training.periodic import Periodic
from mae_et.training.resume.same_ranks import check_same_command
from mae_et.training.run import Run

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@contextmanager
def distributed_session(
    config: "DataclassInstance", process: ProcessConfig
) -> Iterator[tuple[DistributedContext, StopFlag]]:
    """Join the other ranks, which must run the same command; handle signals, hangs and errors.

    Raises:
        UserError: the device is not available, or a rank has other settings or code.
        RunFailed: a rank did not join, memory or the disk ran out, or another rank died.
        Stopped: a signal arrived when there was nothing to save.
    """
    is_run = isinstance(config, RunConfig)  # its opening reports the threads
    patience = process.step_timeout
    with explain_system_errors(), hang_watchdog(patience), stop_signals() as stopped:
        traces = config.output.dir if isinstance(config, RunConfig) else None
        world = distributed.initialize(process.device, patience, traces)
        try:
            check_same_command(config, world)
            check_own_gpus(world)
            workers = worker_count(process.num_workers, world)
            with compute_threads(workers, world, quiet=is_run):
                yield world, stopped
        except Interrupted:  # raised on all ranks together
            distributed.shutdown(world)
            raise
        except BaseException:
            if world.joined:
                limit_exit()
            raise
        distributed.shutdown(world)


def train_run(
    run: Run,
    dataset: Any,
    step: Step[Any],
    periodic: Sequence[Periodic],
    finish: Callable[[RunLogger | None], None],
    files: Mapping[str, str],
    preview: Callable[[], Tensor | None] | None = None,
) -> None:
    """Train a run from its state to its end, and finish it; see `train`.

    `finish` writes the run's final files, on every rank. `files` are texts for the run folder, by
    file name. `preview` draws training views, for a run folder without such an image.
    """
    config, world = run.config, run.world
    num_workers = worker_count(config.efficiency.num_workers, world)
    so_far = run.provenance.get("decode"), run.provenance.get("decode_cpu_sides", ())
    decoder = choose_decoder(config.efficiency.decode, dataset, world, num_workers, *so_far)
    run.provenance |= {
        "decode": "cpu" if decoder is None else decoder.library,
        "decode_cpu_sides": () if decoder is None else decoder.cpu_sides,
    }
    with ExitStack() as stack:
        with fail_together(world):
            logger = stack.enter_context(run_records(run, files))
        checkpoints = stack.enter_context(CheckpointWriter(run, logger))
        if config.data.on_error == "skip":
            run.bad_images = BadImages(
                dataset, config.data.max_bad_fraction, config.output.dir, world, run.state.step
            )
            if logger is not None:
                run.bad_images.write()  # drops rows after the checkpoint
        with training_batches(
            dataset, run.sampler(), num_workers, world.device, run.bad_images, decoder
        ) as batches:
            if logger is not None and preview is not None:
                logger.log_preview(preview)  # while loader processes make the first batches
            train(run, batches, step, logger, checkpoints, periodic)
            if run.state.step == run.plan.steps:
                finish(logger)
    distributed.barrier(world)


@contextmanager
def run_records(run: Run, files: Mapping[str, str]) -> Iterator[RunLogger | None]:
    """Lock the run folder, write config and plan, and open its logger; None on other ranks."""
    if not run.world.is_main:
        yield None
        return
    output, folder = run.config.output, run.config.output.dir
    checkpoints = folder / "checkpoints"
    with sole_writer(folder) as check_lock:
        check_writable(checkpoints)
        # Of a killed process, before this one needs the space.
        for place in (folder, folder / "reconstructions", checkpoints):
            remove_leftovers(place)
        rename_damaged_after(checkpoints, run.state.step)
        prune_checkpoints(checkpoints, output.keep_last, run.keeps)
        plan = json.dumps(run.plan.to_dict(), indent=1)
        texts = {"config.yaml": to_yaml(run.config), "plan.json": plan, **files}
        for name, text in texts.items():
            write_text_atomically(folder / name, text)
        append_line(folder / ENVIRONMENT, json.dumps(describe_environment(run)) + "\n")
        logger = RunLogger(run.config, run.plan, run.state.step, check_lock)
        try:
            with log_file(folder), closing(logger):
                yield logger
        except FileNotFoundError:  # when writing a file or closing TensorBoard's
            check_lock()
            raise


def write_results(run: Run, logger: RunLogger, figures: dict[str, Any]) -> None:
    """Write results.json last, which marks the run as finished.

    It has the figures common to all runs, and those given.
    """
    plan, folder = run.plan, run.config.output.dir
    rows = read_metrics(folder)
    results = {
        **figures,
        "steps": plan.steps,
        "equivalent_epochs": plan.equivalent_epochs,
        "compute": plan.compute,
        "compute_unit": COMPUTE_UNITS[run.config.curriculum.cost],
        "training_seconds": run.state.seconds,
        "stages": summarise_stages(rows, plan),
        "provenance": describe_environment(run),
        **diagnosis(rows),
    }
    if parent := run.provenance.get("parent"):
        results["parent"] = parent
    logger.log_results(results)
    logger.flush()
    write_text_atomically(folder / "results.json", json.dumps(results, indent=1))
