"""Run the trials of a search as jobs: submit independent ones together, then wait for them."""

import time
from collections.abc import Sequence
from pathlib import Path

from mae_et.config.files import to_yaml
from mae_et.config.schema import PretrainConfig
from mae_et.errors import RunFailed
from mae_et.io.atomic import write_text_atomically
from mae_et.runtime.console import say
from slurm.cli import cluster_of
from slurm.command import CommandLine, parse_task
from slurm.events import read_events
from slurm.run_status import ENDED, status
from slurm.submission import submit_together

POLL_SECONDS = 5.0
# Consecutive polls after which a submitted job that never appears counts as lost.
PATIENCE = 24


class ClusterRunner:
    """Train runs as jobs of a cluster, and wait for them.

    Jobs outlive the search: a restarted search waits for those that still run. The folder of the
    search has their code and logs.
    """

    def __init__(self, command_line: CommandLine, cluster: str, folder: Path):
        self.command_line = command_line
        self.cluster, self.folder = cluster_of(cluster), folder

    def __call__(
        self, configs: Sequence[PretrainConfig], stop_after_step: int | None = None
    ) -> list[str | None]:
        """Train; return why each run diverged, or None for a run that did not."""
        if stop_after_step is not None:
            raise ValueError("a job runs to its end: stop_after_step must be None")
        folders = [config.output.dir for config in configs]
        started = [config for config in configs if not self._is_there(config.output.dir)]
        if started:
            tasks = []
            for config in started:
                written = config.output.dir / "trial.yaml"
                write_text_atomically(written, to_yaml(config))
                tasks.append(parse_task(self.command_line, "pretrain", [f"--config={written}"]))
            job = submit_together(tasks, self.cluster, self.folder)
            say(f"search: {len(tasks)} trials as job {job}")
        missing = 0
        while True:
            states = [each.state for folder in folders for each in status([folder])[:1]]
            missing = missing + 1 if "not started" in states else 0
            if missing > PATIENCE or all(state in ENDED for state in states):
                break
            time.sleep(POLL_SECONDS)
        return [self._outcome(folder) for folder in folders]

    def _is_there(self, folder: Path) -> bool:
        """Return whether a run is finished or a job still trains it."""
        if (folder / "results.json").exists():
            return True
        if not read_events(folder):
            return False
        return status([folder])[0].state not in {*ENDED, "not started"}

    def _outcome(self, folder: Path) -> str | None:
        if (folder / "results.json").exists():
            return None
        failures = [event for event in read_events(folder) if event["event"] == "failed"]
        if failures and failures[-1].get("kind") == "Diverged":
            return str(failures[-1].get("sentence", "it diverged"))
        (found, *_) = status([folder])
        raise RunFailed(
            f"job {found.job} of {folder} ended before its run ({found.state}): "
            f"{found.error or 'see its logs'}; the same command restarts it"
        )
