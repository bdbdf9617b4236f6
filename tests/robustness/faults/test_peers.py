"""Processes that die, hang or share a run folder; clocks that jump."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from launch import DRIVER, QUIET, Started, run, same_weights, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import TINY

from mae_et import UserError, pretrain
from mae_et.checkpoints.store import (
    list_checkpoints,
    newest_checkpoint,
    rename_damaged_after,
    save_checkpoint,
)
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.io.lock import sole_writer
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime import watchdog

SHORT = (*QUIET, "--curriculum.epochs=2")


def last_sentence(said: str) -> str:
    return said.strip().splitlines()[-1]


@pytest.mark.slow
def test_second_run_in_one_folder_is_refused(tmp_path) -> None:
    """With exit status 2, and the first completes."""
    folder = tmp_path / "run"
    (first,) = start(folder, "slow_disk:seconds=1", *SHORT)
    try:
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        second = Started(folder, "none", SHORT, rank=9)  # its log has another name
        code, said = second.end()
        assert code == 2
        assert last_sentence(said) == (f"mae-et: another process is writing to output.dir {folder}")
    finally:
        code, said = first.end()
    assert code == 0, said
    assert not list(folder.rglob("*.damaged"))


@pytest.mark.faults
def test_every_rank_reports_that_the_run_folder_is_refused(tmp_path) -> None:
    folder = tmp_path / "run"
    with sole_writer(folder):
        ends = [rank.end() for rank in start(folder, "none", *SHORT, processes=2)]
    assert [code for code, _ in ends] == [2, 2]
    assert all(f"another process is writing to output.dir {folder}" in said for _, said in ends)


def test_run_never_discards_a_checkpoint_saved_by_another_process(tmp_path) -> None:
    """It read step 5; before it took the lock, another process saved step 10."""
    from train_state import state

    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        save_checkpoint(folder, state(step).to_dict(), "seed: 0", {"plan": 1})
    with pytest.raises(UserError, match=r"since this one read step 5: step-00000010\.pt exists"):
        rename_damaged_after(folder, 5)
    assert len(list_checkpoints(folder)) == 2
    list_checkpoints(folder)[-1].write_bytes(b"damaged")
    rename_damaged_after(folder, 5)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000005.pt"]


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO])
def test_run_continues_after_stderr_closes(tiny, monkeypatch, code: int) -> None:
    """A closed pipe or terminal never ends the run; the metrics file has every row."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(code, "gone")

    monkeypatch.setattr(sys, "stderr", Gone())
    folder = pretrain(tiny(*QUIET), stop_after_step=3)
    assert [row["step"] for row in read_metrics(folder)] == [2, 3]


@pytest.mark.faults
@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_clock_jump_of_a_day_changes_no_metric(tmp_path, jump: int) -> None:
    """Durations come from the monotonic clock; rows keep their order in TensorBoard."""
    folder = tmp_path / "run"
    code, said = run(folder, f"clock:step=4,jump={jump}", "--curriculum.epochs=2")
    assert code == 0, said
    rows = read_metrics(folder)
    jumps = [after["time"] - before["time"] for before, after in pairwise(rows)]
    assert any(abs(passed - jump) < 600 for passed in jumps)  # it was the clock of the wall
    assert all(0 < row["window_seconds"] < 600 and row["images_per_second"] > 0 for row in rows)
    assert all("ETA 0:" in line for line in said.splitlines() if line.startswith("step "))
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert [s.step for s in found.Scalars("loss/train")] == [row["step"] for row in rows]


@pytest.mark.faults
def test_run_resumes_after_the_clock_was_set_back(tmp_path) -> None:
    """The new event file is older by the clock, and still replaces the previous one."""
    folder = tmp_path / "run"
    assert run(folder, "die:step=8")[0] == -signal.SIGKILL
    code, said = run(folder, "clock:step=5,jump=-86400")
    assert code == 0, said
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    steps = [row["step"] for row in read_metrics(folder)]
    assert [s.step for s in found.Scalars("loss/train")] == steps == sorted(set(steps))


@pytest.mark.faults
def test_killed_loader_process_ends_the_run_which_then_resumes(tmp_path) -> None:
    clean, folder = tmp_path / "clean", tmp_path / "run"
    assert run(clean, "none", *QUIET)[0] == 0
    code, said = run(folder, "lose_worker:step=7", *QUIET, "--efficiency.num_workers=2")
    assert code == 1
    assert "a loader worker died" in last_sentence(said)
    assert newest_checkpoint(folder / "checkpoints")["step"] == 5
    assert run(folder, "none", *QUIET, "--efficiency.num_workers=2")[0] == 0
    assert same_weights(folder, clean)


BROKE = "the connection to another rank broke"

# --- several ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code", "sentence"),
    [
        ("oom", 1, "mae-et: CUDA out of memory: --efficiency.micro_batch auto"),
        ("bug", 70, "ZeroDivisionError: a bug"),
    ],
)
def test_failed_rank_reports_its_reason_at_once_and_its_peer_ends(
    tmp_path, kind: str, code: int, sentence: str
) -> None:
    """Tearing down NCCL waits for the peers, which wait for the failed rank in a collective."""
    folder = tmp_path / "run"
    pair = start(folder, f"fail:step=3,on=1,kind={kind}", *QUIET, processes=2)
    ends = [one.end(60) for one in reversed(pair)]
    assert ends[0][0] == code
    assert last_sentence(ends[0][1]).startswith(sentence)
    assert ends[1][0] == 1
    assert "the connection to another rank broke" in last_sentence(ends[1][1])


@pytest.mark.parametrize(
    ("function", "flags", "other"),
    [
        ("checkpoint_writer.save_checkpoint", [], "failed: CUDA out of memory"),
        ("reconstructions.panel_grid", ["--output.reconstruct_images=2"], BROKE),
        ("online_probe.measure", ["--probe.every=50%"], BROKE),
        ("online_probe.pool_tokens", ["--probe.every=50%", "--efficiency.sharding=full"], BROKE),
    ],
)
def test_failure_of_what_the_main_rank_does_alone_ends_the_other_rank(
    tmp_path, function: str, flags: list[str], other: str
) -> None:
    """It saves, draws and scores while the other waits or runs the next step."""
    fault = f"fail_in:rank=0,function=mae_et.training.{function}"
    pair = start(tmp_path / "run", fault, *QUIET, *flags, processes=2)
    ends = [one.end(60) for one in pair]
    assert [code for code, _ in ends] == [1, 1]
    assert last_sentence(ends[0][1]).startswith("mae-et: CUDA out of memory")
    assert other in last_sentence(ends[1][1])


def test_signal_to_one_rank_stops_all_after_the_same_step(tmp_path) -> None:
    """The next one, during which they agree: nobody waits for the exchange."""
    pair = start(tmp_path / "run", "stop:rank=1,step=6", *QUIET, processes=2)
    for code, said in (one.end(60) for one in pair):
        assert code == 128 + signal.SIGTERM
        assert "stopped by SIGTERM after step 8, which is saved" in last_sentence(said)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 8


LINGERS = """
import atexit, ctypes, torch
from mae_et import PretrainConfig
from mae_et.runtime import distributed, watchdog
from mae_et.training.session import distributed_session

joined = distributed.DistributedContext(0, 1, torch.device("cpu"), joined=True)
distributed.initialize = lambda *_: joined
watchdog.EXIT_SECONDS = 1
atexit.register(ctypes.CDLL(None).sleep, 10_000)
config = PretrainConfig()
with distributed_session(config, config.efficiency):
    raise ZeroDivisionError("a bug")
"""


def test_failed_rank_ends_even_if_its_teardown_hangs() -> None:
    """Aborting NCCL at exit may wait for the peers, which wait for this rank to end."""
    done = subprocess.run(
        [sys.executable, "-c", LINGERS], capture_output=True, text=True, timeout=100
    )
    assert last_sentence(done.stderr) == "ZeroDivisionError: a bug"
    assert done.returncode == -signal.SIGALRM


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_other_rank_with_an_error(tmp_path, victim) -> None:
    """Without a launcher. Both resume to the result of an uninterrupted run."""
    clean, folder = tmp_path / "clean", tmp_path / "run"
    assert run(clean, "none", *QUIET, processes=2)[0] == 0
    pair = start(folder, f"die:rank={victim},step=7", *QUIET, processes=2)
    ends = [one.end() for one in pair]
    assert ends[victim][0] == -signal.SIGKILL
    code, said = ends[1 - victim]
    assert code == 1
    assert "the connection to another rank broke" in last_sentence(said)
    assert newest_checkpoint(folder / "checkpoints")["step"] == 5
    assert run(folder, "none", *QUIET, processes=2)[0] == 0
    assert same_weights(folder, clean)


@pytest.mark.faults
def test_hung_rank_ends_every_rank_with_its_stack_in_the_log(tmp_path) -> None:
    """Within the time-out and a margin; the same command then resumes.

    The one that hangs ends with status 75; the other too, unless it sees the first end before.
    """
    folder, limit = tmp_path / "run", 20  # also of waiting for each other at the start
    timeout = f"--efficiency.step_timeout={limit}"
    pair = start(folder, "hang:rank=1,step=7", *QUIET, timeout, processes=2)
    while not list_checkpoints(folder / "checkpoints"):
        time.sleep(0.05)
    began = time.monotonic()
    ends = [one.end() for one in pair]
    assert time.monotonic() - began < 3 * limit + watchdog.PEERS_SECONDS + 10
    assert ends[1][0] == watchdog.EXIT_STATUS
    assert ends[0][0] in {1, watchdog.EXIT_STATUS}
    for rank, (_, said) in enumerate(ends):
        assert f"mae-et: rank {rank} finished no step or batch in {limit} s" in said
    assert ["in struck" in said for _, said in ends] == [False, True]  # where it hangs
    assert run(folder, "none", *QUIET, processes=2)[0] == 0


def torchrun(folder: Path, fault: str, *flags: str, restarts: int = 0) -> CompletedProcess[str]:
    """Pre-train with two ranks of torchrun, and a fault in them."""
    config = folder.with_name("tiny.yaml")
    config.write_text(TINY)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [f"--max-restarts={restarts}", str(DRIVER), fault, "pretrain", f"--config={config}"]
    words += [*QUIET, f"--output.dir={folder}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.mark.faults
def test_torchrun_restarts_a_run_whose_rank_died(tmp_path) -> None:
    """It resumes from the newest checkpoint, with the weights of an uninterrupted run."""
    torchrun(tmp_path / "whole", "none").check_returncode()
    done = torchrun(tmp_path / "run", "die:rank=1,step=7,starts=1", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resumes after step 5" in done.stderr
    assert same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.faults
def test_torchrun_ends_when_a_rank_hangs(tmp_path) -> None:
    """With a status other than 0 and the stacks of both ranks."""
    done = torchrun(tmp_path / "run", "hang:rank=1,step=3", "--efficiency.step_timeout=20")
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank} finished no step or batch in 20 s" in done.stderr
    assert "most recent call first" in done.stderr


# --- the watchdog of one process ------------------------------------------------------------------


@pytest.mark.faults
def test_hung_process_ends_with_its_stack_and_status(tmp_path) -> None:
    """Without a launcher, and with its loader processes."""
    folder = tmp_path / "run"
    flags = (*SHORT, "--efficiency.step_timeout=3", "--efficiency.num_workers=1")
    code, said = run(folder, "hang:step=3", *flags)
    assert code == watchdog.EXIT_STATUS
    assert "rank 0 finished no step or batch in 3 s (step_timeout)" in said
    assert "most recent call first" in said
    assert "in struck" in said  # the function that hangs


@pytest.mark.faults
def test_suspended_process_is_not_treated_as_hung(tmp_path) -> None:
    """SLURM suspends jobs to make room for others, and resumes them hours later."""
    began = time.monotonic()
    flags = (*SHORT, "--efficiency.step_timeout=6")
    code, said = run(tmp_path / "run", "stop_and_go:step=3,seconds=10", *flags)
    assert time.monotonic() - began > 10
    assert code == 0, said


def test_watchdog_starts_at_the_first_step_and_can_be_disabled(monkeypatch) -> None:
    """Opening data may take longer than a step; null disables it."""
    ended = []
    monkeypatch.setattr(watchdog._Watch, "end", lambda watch: ended.append(watch))
    with watchdog.hang_watchdog(0.1):
        time.sleep(0.4)
        assert not ended
        watchdog.heartbeat()
        patience = time.monotonic() + 60
        while not ended:
            assert time.monotonic() < patience
            time.sleep(0.01)
    ended.clear()
    with watchdog.hang_watchdog(None):
        watchdog.heartbeat()
        time.sleep(0.3)
    watchdog.heartbeat()  # outside of any run
    assert not ended
    with pytest.raises(UserError, match=r"step_timeout must lie in \(0, 1e8\], got 0"):
        EfficiencyConfig(step_timeout=0)
