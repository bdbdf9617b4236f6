"""What all kinds of runs share, from joining the ranks to the final figures."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mae_et.checkpoints.store import prune_checkpoints, rename_damaged_after
from mae_et.config.efficiency import ProcessConfig
from mae_et.config.files import to_record
from mae_et.config.schema import RunConfig
from mae_et.curriculum.table import COMPUTE_UNITS
from mae_et.data.bad_images import BadImages
from mae_et.data.cache import cache_images
from mae_et.data.cores import compute_threads, worker_count
from mae_et.data.device.choose_decoder import choose_decoder
from mae_et.data.images.decoding import check_sample
from mae_et.data.loader import training_batches
from mae_et.errors import Interrupted
from mae_et.io.atomic import remove_leftovers, write_text_atomically
from mae_et.io.lock import check_writable, sole_writer
from mae_et.io.metrics_file import read_metrics
from mae_et.io.plain_files import append_line
from mae_et.monitoring.divergence import diagnosis
from mae_et.monitoring.log_file import log_file
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.summaries import summarise_stages
from mae_et.runtime import distributed
from mae_et.runtime.agreement import fail_together
from mae_et.runtime.distributed import DistributedContext
from mae_et.runtime.placement import check_own_gpus
from mae_et.runtime.signals import StopFlag, stop_signals
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.runtime.watchdog import hang_watchdog, limit_exit
from mae_et.training.build import build_run
from mae_et.training.checkpoint_writer import CheckpointWriter
from mae_et.training.environment import ENVIRONMENT, describe_environment
from mae_et.training.loop import train
from mae_et.training.opening import describe_run, describe_start, say_facts
from mae_et.training.plan import resumed_plan
from mae_et.training.resume import branch
from mae_et.training.resume.find_checkpoint import find_checkpoint
from mae_et.training.resume.same_data import check_data, moved_data
from mae_et.training.resume.same_ranks import check_same_command
from mae_et.training.run import Run
from mae_et.training.task import Task

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


def train_run(task: Task, stop_after_step: int | None = None) -> None:
    """Train a task to its end, from the newest checkpoint of its run folder, and finish it.

    With `stop_after_step`, save the state and return after this many steps.
    """
    config = task.config
    with distributed_session(config, config.efficiency) as (world, stopped):
        saved, finished = find_checkpoint(config, world)
        if finished:
            say_facts(start="finished before")
        stopped_before = saved and stop_after_step is not None and saved["step"] >= stop_after_step
        moved = saved is not None and moved_data(config, saved)
        if stopped_before or (finished and not moved):
            return
        with fail_together(world):
            source = task.open_images()
            check_sample(source)
        saved, files = branch.start(config, saved, source, world)
        provenance = check_data(config, saved, source, world)
        if finished:
            return
        images = cache_images(source, config, world)
        torch.manual_seed(config.seed)
        model, initial = task.build_model(saved, world)
        plan = resumed_plan(config, saved, task.make_plan(model, len(source)))
        run = build_run(task, model, plan, world, saved, stopped, stop_after_step)
        del saved  # its tensors are in the run now
        say_facts(**describe_run(run))
        dataset = task.augment(model, images, plan)
        train_and_record(task, run, dataset, provenance | initial, files | task.files(run))


def train_and_record(
    task: Task, run: Run, dataset: Any, provenance: dict[str, Any], files: Mapping[str, str]
) -> None:
    """Train a run on a dataset, with records and checkpoints in its folder."""
    config, world = run.config, run.world
    num_workers = worker_count(config.efficiency.num_workers, world)
    so_far = provenance["decode"], provenance["decode_cpu_sides"]
    decoder = choose_decoder(config.efficiency.decode, dataset, world, num_workers, *so_far)
    decode = {
        "decode": "cpu" if decoder is None else decoder.library,
        "decode_cpu_sides": () if decoder is None else decoder.cpu_sides,
    }
    run = replace(run, provenance=provenance | decode)
    periodic = task.periodic(run)
    with ExitStack() as stack:
        with fail_together(world):
            logger = stack.enter_context(run_records(run, files))
        checkpoints = stack.enter_context(CheckpointWriter(run, logger))
        bad_images = None
        if config.data.on_error == "skip":
            bad_images = BadImages(
                dataset, config.data.max_bad_fraction, config.output.dir, world, run.state.step
            )
            if logger is not None:
                bad_images.write()  # drops rows after the checkpoint
        with training_batches(
            dataset, run.sampler(), num_workers, world.device, bad_images, decoder
        ) as batches:
            if logger is not None:  # while loader processes make the first batches
                logger.log_preview(partial(task.preview, run, dataset))
            train(run, batches, task.loss, logger, checkpoints, periodic, bad_images)
            if run.state.step == run.plan.steps:
                task.finish(run, logger)
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
        say_facts(start=describe_start(run.config, run.state.step))
        rename_damaged_after(checkpoints, run.state.step)
        prune_checkpoints(checkpoints, output.keep_last, run.keeps)
        plan = json.dumps(run.plan.to_dict(), indent=1)
        texts = {"config.yaml": to_record(run.config), "plan.json": plan, **files}
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
