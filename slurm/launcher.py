"""Submit jobs through submitit's executors: slurm, local and debug."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from mae_et.errors import UserError, one_line
from mae_et.io.atomic import write_text_atomically
from mae_et.runtime.console import null_streams, say
from slurm.config import OWN_OPTIONS, ClusterConfig
from slurm.events import START
from slurm.job import Job
from slurm.private import private_files

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
# Variables of SLURM that name the cluster and the user; others describe the job that submits.
CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
OPTION_OF_VARIABLE = {"array_inx": "array", "mem_per_node": "mem", "timelimit": "time"}


class Launcher:
    """Submit one job, or several as an array.

    All nodes share `folder`, which has submitit's files and logs, and `code`, which has the
    packages that jobs import.
    """

    def __init__(
        self, config: ClusterConfig, folder: Path, code: Path, name: str, jobs: Sequence[Job]
    ):
        self.config, self.folder, self.code, self.name = config, folder.absolute(), code, name
        self.jobs = list(jobs)
        self.runs = json.dumps([str(job.folder.absolute()) for job in jobs])
        digest = hashlib.blake2b(self.runs.encode(), digest_size=6).hexdigest()
        self.runs_file = self.folder / f"runs-{digest}.json"

    def script(self) -> str:
        """Return the batch script."""
        count = len(self.jobs)
        command = [sys.executable, "-u", "-m", "submitit.core._submit", str(self.folder)]
        return _make_sbatch_string(
            command=shlex.join(command),
            folder=self.folder,
            map_count=count if count > 1 else None,
            **self._parameters(),
        )

    def check(self) -> str:
        """Validate the script with `sbatch --test-only`; return SLURM's estimate."""
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise UserError(
                f"this machine has no SLURM ({', '.join(missing)} not found); submit from a login "
                "node, or use --executor local"
            )
        with self._environment():
            done = subprocess.run(
                ["sbatch", "--test-only"],
                input=self.script(),
                capture_output=True,
                text=True,
                check=False,
            )
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        if done.returncode:
            raise UserError(f"SLURM refuses the job: {said.removeprefix('allocation failure: ')}")
        found = re.search(r"to start at (\S+) using .* on nodes (\S+)", said)
        return f"SLURM would start it at {found[1]} on {found[2]}" if found else said

    def submit(self) -> list[submitit.Job[None]]:
        """Submit the jobs and return submitit's handles, in order."""
        executor = self._executor()
        with self._environment(), private_files(self.folder):
            write_text_atomically(self.runs_file, self.runs)
            try:
                if len(self.jobs) == 1:
                    return [executor.submit(self.jobs[0])]
                submitted = []
                with executor.batch():  # ids are known once the block ends
                    submitted += [executor.submit(job) for job in self.jobs]
                return submitted
            except FailedJobError as error:
                raise UserError(f"SLURM refuses the job: {one_line(error)}") from error
            except FailedSubmissionError as error:
                said = one_line(str(error).partition("Job instance")[0])
                raise UserError(f"{said}; squeue shows whether there is a job") from error

    def _executor(self) -> submitit.Executor:
        config = self.config
        if config.executor == "debug":
            return submitit.DebugExecutor(self.folder)
        if config.executor == "local":
            if config.setup:
                say("warning: executor local does not run the lines of setup")
            local = submitit.LocalExecutor(self.folder, max_num_timeout=config.timeouts)
            local.update_parameters(
                timeout_min=config.minutes,
                tasks_per_node=config.tasks,
                gpus_per_node=config.gpus,
                signal_delay_s=config.signal_delay,
            )
            return local
        slurm = submitit.SlurmExecutor(self.folder, max_num_timeout=config.timeouts)
        slurm.update_parameters(**self._parameters())
        return slurm

    def _parameters(self) -> dict[str, Any]:
        config = self.config
        parameters: dict[str, Any] = {
            "job_name": self.name,
            "time": config.minutes,
            "nodes": config.nodes,
            "ntasks_per_node": config.tasks,
            "cpus_per_task": config.cpus_per_task,
            "gpus_per_node": config.gpus_per_node if config.gpus else None,
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "exclude": config.exclude,
            "mail_user": config.mail_user,
            "mail_type": config.mail_type if config.mail_user else None,
            "dependency": config.dependency,
            "signal_delay_s": config.signal_delay,
            "array_parallelism": config.array_parallelism,
            "wckey": None,  # submitit's default, rejected by clusters that track wckeys
            "setup": self._setup(),
            "teardown": self._teardown(),
            "srun_args": self._srun_arguments(),
        }
        memory = {} if config.memory_gb is None else {"mem": f"{round(config.memory_gb * 1024)}M"}
        # Without it, the follow-ups of a failed job would stay pending forever.
        waits = {"kill_on_invalid_dep": "yes"} if config.dependency else {}
        further = {"requeue": True, **memory, **waits, **config.extra}
        parameters["additional_parameters"] = further
        return parameters

    def _setup(self) -> list[str]:
        exports = [f"export {name}={value}" for name, value in self._variables().items()]
        # Ranks and loader workers share the cores; torch would start one thread per core in each.
        threads = 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"'
        start = f'echo "{START}" >&2'
        return [start, *self.config.setup, self._ownership_check(), *exports, threads]

    def _ownership_check(self) -> str:
        """Return a line that ends the job if its pickle or its code is not this user's.

        While a job is pending, anyone who can write to a parent of the run folder can replace it.
        Without its copied code, the job would run the code that is installed by then.
        """
        places = shlex.join([str(self.folder), str(self.code.absolute())])
        return (
            f"for place in {places}; do "
            'if [ ! -O "$place" ]; then '
            'echo "mae-et: $place was deleted, or replaced by another user\'s; the job ends" >&2; '
            "exit 2; fi; done"
        )

    def _variables(self) -> dict[str, str]:
        """Return environment variables: the path of the copied code, and the network interface."""
        path = f'{shlex.quote(str(self.code.absolute()))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        interface = self.config.network_interface
        # Both are needed: gradients use NCCL, flags and metrics on the CPU use gloo.
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if interface else ()
        own = {name: shlex.quote(str(interface)) for name in names}
        return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | own

    def _teardown(self) -> list[str]:
        after = [sys.executable, "-m", "slurm.retry", str(self.runs_file)]
        # Only after a failure. The script ends with srun's status.
        return [f"status=$?; [ $status = 0 ] || {shlex.join(after)} $status {self.config.retries}"]

    def _srun_arguments(self) -> list[str]:
        # Since SLURM 22.05 srun does not inherit --cpus-per-task from the job.
        cores = self.config.cpus_per_task
        return [
            "--export=ALL",  # also under sbatch --export=NONE
            "--kill-on-bad-exit=1",
            *([f"--cpus-per-task={cores}"] if cores else []),
            *self.config.srun,
        ]

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Hide the variables of a job that submits this one, and those that override the script.

        sbatch prefers its variables, such as SBATCH_PARTITION, to the options of a script; those
        that the script leaves open remain. Local jobs are pointed to the copied code.
        """
        local = self.config.executor == "local"
        kept = {name: value for name, value in os.environ.items() if self._is_kept(name)}
        if local:
            before = os.environ.get("PYTHONPATH")
            kept["PYTHONPATH"] = f"{self.code.absolute()}{f':{before}' if before else ''}"
            kept["PYTHONSAFEPATH"] = "1"
        with clean_env(), environment_variables(**kept), null_streams() if local else nullcontext():
            yield

    def _is_kept(self, variable: str) -> bool:
        if not variable.startswith("SBATCH_"):
            return variable in CLUSTER_VARIABLES
        option = variable.removeprefix("SBATCH_").lower()
        option = OPTION_OF_VARIABLE.get(option, option)
        flag = re.escape(option.replace("_", "-"))
        is_set = re.search(rf"^#SBATCH --{flag}(=|$)", self.script(), re.MULTILINE)
        return option not in OWN_OPTIONS and not is_set
