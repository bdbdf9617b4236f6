"""Submit a command with its follow-ups, or a sweep; check everything before submitting."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_et.config.files import to_yaml
from mae_et.data.layout import check_outside
from mae_et.errors import UserError
from mae_et.io.lock import sole_writer
from mae_et.io.plain_files import read_text
from mae_et.runtime.console import printable, say
from mae_et.training.resume.same_run import check_same_run
from slurm import preflight
from slurm.command import (
    BENCH,
    PROBES,
    TRAININGS,
    CommandLine,
    Task,
    follow_up,
    freeze_configs,
    parse_task,
    sweep_tasks,
)
from slurm.config import ClusterConfig, job_name
from slurm.events import read_events, record_event
from slurm.job import Job
from slurm.launcher import Launcher
from slurm.private import private_files
from slurm.snapshot import snapshot
from slurm.squeue import TERMINAL, job_states, run_program

TABLE_TIME = "30"
# Time left to requeue the job between the end of a hung process and the time limit.
MARGIN_SECONDS = 30


def submit(
    command_line: CommandLine,
    kind: str,
    arguments: Sequence[str],
    cluster: ClusterConfig,
    then: Sequence[str] = (),
    sweep: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Submit a command of mae-et.

    Args:
        command_line: parses and runs it: `mae_et.cli.slurm_jobs.command_line()`.
        kind: one of `slurm.command.KINDS`.
        arguments: arguments of the command.
        cluster: resources of the job.
        then: follow-ups, KIND or KIND=RECIPE, that start from its checkpoint once it succeeds.
        sweep: `key=value,value`: one run per combination, as a job array, and a final table.
        dry_run: check everything that does not require SLURM, print each job's script and resolved
            config, and submit nothing.

    Returns:
        `run`, the run folder, and `jobs`, the id of each job by its kind.

    Raises:
        UserError: the command, the cluster or the folder is invalid; nothing is submitted.
    """
    first = parse_task(command_line, kind, arguments)
    runs = sweep_tasks(first, sweep) if sweep else [first]
    groups = [runs, *([follow_up(run, words) for run in runs] for words in then)]
    if sweep:
        groups.append([_table(first.folder, groups)])
    folders = Counter(each.folder for group in groups for each in group)
    for folder in (folder for folder, jobs in folders.items() if jobs > 1):
        raise UserError(
            f"two jobs would write to {folder}: give each kind of --then and each value of --sweep "
            "once"
        )
    if cluster.executor != "slurm" and (len(groups) > 1 or cluster.dependency):
        raise UserError(
            f"--then, --sweep and --dependency need SLURM, not executor {cluster.executor}: run "
            "the commands in turn, as in docs/slurm.md (Without SLURM)"
        )
    preflight.check_path(first.folder)
    for start in {run.start for run in runs}:
        preflight.check_start(start)
    for follower in (each for group in groups[1:] for each in group if each.kind != "compare"):
        preflight.check_classes(follower.config.data or first.config.data, follower.kind)
    for run in (run for run in runs if run.kind in (*PROBES, "evaluate")):
        preflight.check_scoring(run.kind, run.config)
    _check_roots([each for group in groups for each in group])
    for group in groups:
        _check(group, cluster, first.folder, dry_run)
    alone = replace(cluster, dependency=None)
    for group in groups if dry_run else []:
        _show(group, cluster if group is runs else alone, first.folder)
    jobs: dict[str, str] = {}
    try:
        for group in [] if dry_run else groups:
            waiting = replace(cluster, dependency=_dependency(group, jobs) or cluster.dependency)
            jobs[group[0].kind] = _submit(group, waiting, first.folder)
    except BaseException:  # also Ctrl-C
        _cancel(jobs)
        raise
    return {"run": str(first.folder), "jobs": jobs}


def submit_together(tasks: list[Task], cluster: ClusterConfig, root: Path) -> str:
    """Submit tasks as a job, or an array if there are several; `root` gets its code and logs."""
    _check_roots(tasks)
    _check(tasks, cluster, root)
    return _submit(tasks, cluster, root)


def _table(folder: Path, groups: list[list[Task]]) -> Task:
    """Return the task that tabulates the results of a sweep."""
    words = [*(str(run.folder) for run in groups[0]), f"--output={folder / 'results.md'}"]
    command_line = groups[0][0].command_line
    return Task(command_line, "compare", words, folder, command_line.parse("compare", words))


def _launcher(group: list[Task], cluster: ClusterConfig, root: Path, code: Path) -> Launcher:
    """Return the launcher of tasks of one kind."""
    if group[0].kind == BENCH:
        cluster = cluster.one_task()
    if group[0].is_single:
        cluster = cluster.single()
    if group[0].kind == "compare":
        cluster = replace(cluster, gpus_per_node=0, time=TABLE_TIME)
    name = job_name(cluster, root)
    if group[0].folder != root:
        name += f"-{group[0].kind}"
    grace = max(MARGIN_SECONDS / 2, cluster.signal_delay - MARGIN_SECONDS)
    limit = 60.0 * cluster.minutes - cluster.signal_delay
    jobs = [
        Job(each.command_line.run, each.words, each.folder.absolute(), grace, limit)
        for each in group
    ]
    return Launcher(cluster, root / "slurm", code, name, jobs)


def _cancel(jobs: dict[str, str]) -> None:
    """Cancel the jobs of a chain that could not be submitted as a whole."""
    ids = " ".join(jobs.values())
    if jobs and run_program("scancel", *jobs.values()) is None:
        say(f"warning: job {ids} was submitted before the error; cancel it with scancel {ids}")
    elif jobs:
        say(f"job {ids}, submitted before the error, was cancelled")


def _dependency(group: list[Task], jobs: dict[str, str]) -> str | None:
    """Return the dependency of follow-ups: their own run, or all jobs for the final table."""
    if not jobs:
        return None
    if group[0].kind == "compare":
        return "afterany:" + ":".join(jobs.values())
    first = next(iter(jobs.values()))
    return f"{'aftercorr' if len(group) > 1 else 'afterok'}:{first}"


def _show(group: list[Task], cluster: ClusterConfig, root: Path) -> None:
    """Print a group's script and resolved configs."""
    launcher = _launcher(group, cluster, root, root / "slurm" / "code")
    if cluster.executor == "slurm":
        print(launcher.script())
    for each in group:
        print(f"# mae-et {printable(shlex.join(each.words))}")  # a comment is one line
        print(to_yaml(each.config))


def _submit(group: list[Task], cluster: ClusterConfig, root: Path) -> str:
    """Submit a group; return the job's id."""
    folder = root / "slurm"
    with private_files(folder):
        code = snapshot(folder)
        kept = [freeze_configs(each, folder) for each in group]
    with sole_writer(folder, "the job files in"):
        for each in kept:
            _check_queue(each.folder)  # again: another submission may have come first
        submitted = _launcher(kept, cluster, root, code).submit()
        facts = {"kind": group[0].kind, "executor": cluster.executor, "restart": 0}
        for each, job in zip(kept, submitted, strict=True):
            logs = str(folder.absolute())
            record_event(each.folder, "submitted", job=job.job_id, logs=logs, **facts)
    if cluster.executor == "debug":
        with private_files(folder):  # which restores this process's umask, as the jobs change it
            for job in submitted:
                job.result()
    return submitted[0].job_id.partition("_")[0]


# --- before anything is submitted -----------------------------------------------------------------


def _check(group: list[Task], cluster: ClusterConfig, root: Path, dry_run: bool = False) -> None:
    """Refuse tasks that would fail later; a dry run does not write files or require SLURM."""
    for each in group:
        preflight.check_folder(each.folder, dry_run)
        _check_queue(each.folder)
        if each.kind in (*TRAININGS, BENCH):
            preflight.check_model_name(each.config)
        if each.kind in TRAININGS:
            _check_training(each, cluster)
    if group[0].kind in TRAININGS and cluster.executor == "slurm" and not cluster.requests_gpus:
        _report_missing_gpus(group[0])
    if cluster.executor == "slurm" and not dry_run:
        launcher = _launcher(group, cluster, root, root / "slurm")
        say(f"{group[0].kind}: {launcher.check()}")


def _report_missing_gpus(task: Task) -> None:
    """Warn if training requests no GPU and its config does not request the CPU."""
    if task.config.efficiency.device != "cpu":
        say(
            f"warning: {task.kind} requests no GPU: give --gpus_per_node, or a cluster file with "
            "--cluster (see configs/cluster/example.yaml); --efficiency.device cpu trains on CPUs"
        )


def _check_roots(tasks: list[Task]) -> None:
    """Check the images of trainings, which the runs of a sweep or a chain share."""
    trainings = [each.config.data for each in tasks if each.kind in TRAININGS]
    for data in {(data.source, data.root): data for data in trainings}.values():
        preflight.check_root(data)


def _check_queue(folder: Path) -> None:
    """Refuse a run folder that another job is still writing to."""
    events = [event for event in read_events(folder) if event["event"] == "submitted"]
    for job, state in job_states(event.get("job") or "" for event in events[-3:]).items():
        if state.state not in TERMINAL:
            raise UserError(f"{folder} already has job {job} ({state.state}); scancel it first")


def _check_training(each: Task, cluster: ClusterConfig) -> None:
    config = each.config
    batch, ranks = config.optim.batch_size, cluster.ranks
    if batch % ranks:
        raise UserError(f"optim.batch_size {batch} is not divisible by {ranks} ranks")
    may_wait = cluster.dependency is not None
    if each.kind == "pretrain":
        preflight.check_plan(config, ranks, may_wait)
    else:
        preflight.check_classifier(each.kind, config, may_wait)
    written = each.folder / "config.yaml"
    if written.exists():
        saved = {"config": read_text(written)}
        check_same_run(config, saved, finished=(each.folder / "results.json").exists())
    check_outside(config.data, each.folder)
