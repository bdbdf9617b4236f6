"""Two processes over gloo are held to one process with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from mae_et import UserError, distributed
from mae_et.checkpoint import newest_checkpoint
from mae_et.monitor import read_metrics


def run(folder: Path, processes: int, *flags: str) -> subprocess.CompletedProcess:
    (folder / "tiny.yaml").write_text(TINY)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = ["-m", "mae_et", "pretrain", f"--config={folder / 'tiny.yaml'}",
               f"--output.folder={folder / str(processes)}", *flags]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *command],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip


def test_two_processes_give_one_s_losses_and_weights_and_resume_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    for processes in (1, 2):
        done = run(tmp_path, processes, "--efficiency.micro_batch=3", "--output.log_every=1")
        assert done.returncode == 0, done.stderr
    one, two = (
        [row["loss"] for row in read_metrics(tmp_path / str(processes))] for processes in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-5)
    one, two = (newest_checkpoint(tmp_path / str(p) / "checkpoints") for p in (1, 2))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=2e-4)


def test_processes_that_do_not_divide_the_batch_are_refused_once_each(tmp_path: Path) -> None:
    failed = run(tmp_path, 2, "--optim.batch_size=13")
    assert failed.returncode != 0
    assert "optim.batch_size 13 is not divided by 2 processes" in failed.stderr


def test_alone_there_is_nothing_to_agree_on() -> None:
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert distributed.agree(True, world)
    assert not distributed.agree(False, world)
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.mean(values, world), values)
    distributed.barrier(world)
    distributed.stop(world)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        distributed.choose_device("cuda")
