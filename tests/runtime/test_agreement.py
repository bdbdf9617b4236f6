"""What differs between ranks is named on every rank; an error of one rank ends all."""

import multiprocessing
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mae_et.config.schema import OutputConfig, PretrainConfig
from mae_et.errors import RunFailed, UserError
from mae_et.runtime.agreement import (
    check_ranks_agree,
    code_version,
    fail_together,
    source_digest,
    tensor_digests,
)
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.resume import branch
from mae_et.training.resume.find_checkpoint import find_checkpoint
from mae_et.training.resume.same_ranks import check_same_start
from slurm.snapshot import snapshot

FORK = multiprocessing.get_context("fork")
NODE = socket.gethostname()


def continues(folder: Path, world: DistributedContext) -> None:
    """Start a run that continues one whose folder the main rank alone sees."""
    saved = {"model": {"weight": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(3)}}}

    def read(*_) -> tuple:
        assert world.is_main
        return saved, {"metrics.jsonl": "{}"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "read_parent", read)
        config: Any = SimpleNamespace(continues=folder)
        source: Any = None  # not read
        found, files = branch.start(config, None, source, world)
    assert found is not None
    assert found["model"]["weight"].equal(torch.ones(2))
    assert found["optimizer_on_main"]
    assert list(files) == (["metrics.jsonl"] if world.is_main else [])


def outcomes_of(rank: int, folder: Path) -> list[str]:
    """Return what the cases below raise on a rank of two."""
    world = DistributedContext(rank, 2, torch.device("cpu"))
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    if rank:
        model.weight.data[0, 0] = -model.weight.data[0, 0]
    norm = nn.BatchNorm1d(2)
    norm.running_mean[0] = [0.0, -0.0][rank]  # equal numbers, other bits
    odd = nn.ParameterDict(
        {"empty": torch.empty(0, 3), "one": torch.ones((), dtype=torch.bfloat16)}
    )

    folder.mkdir(parents=True)
    for name in ["results.json"] if rank else ["results.json", "encoder.safetensors"]:
        (folder / name).write_text("{}")  # a shared folder that lags on rank 1
    config = PretrainConfig(output=OutputConfig(dir=folder))

    def fails(error: Exception, on: int) -> None:
        with fail_together(world):
            if rank == on:
                raise error

    cases = [
        lambda: check_ranks_agree({"seed": 1, "lr": 0.1}, world),
        lambda: check_ranks_agree({"seed": 1, "optim.base_lr": [0.1, 0.2][rank]}, world),
        lambda: check_ranks_agree({"seed": 1} | ({"the extra": 3} if rank else {}), world),
        lambda: check_ranks_agree({"checkpoint": f"step {rank}"}, world, RunFailed),
        lambda: check_same_start(model, None, world),
        lambda: find_checkpoint(config, world),
        lambda: check_ranks_agree({"clip": float("nan"), "empty": [], "none": None}, world),
        lambda: check_ranks_agree({"scale": [0.3, 0.1 + 0.2][rank]}, world),
        lambda: check_ranks_agree({"size": [32, 32.0][rank]}, world),
        lambda: check_ranks_agree({"name": ["a", "a\x1b[2J"][rank]}, world),
        lambda: check_same_start(norm, None, world),
        lambda: check_same_start(odd, None, world),
        lambda: fails(UserError("no data\x1b[2J here"), on=1),
        lambda: fails(RunFailed("disk"), on=0),
        lambda: fails(UserError("never"), on=2),
        lambda: continues(folder, world),
    ]
    found = []
    for case in cases:
        try:
            case()
            found.append("equal")
        except (UserError, RunFailed) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_every_rank_names_the_rank_the_node_and_what_differs(tmp_path: Path) -> None:
    def target(rank: int, queue) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(str(tmp_path / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        queue.put((rank, outcomes_of(rank, tmp_path / str(rank) / "run")))

    queue = FORK.Queue()
    ranks = [FORK.Process(target=target, args=(rank, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    start = f"rank 1 (on {NODE}) differs from rank 0 (on {NODE})"
    expected = [
        "equal",
        f"UserError: {start}: optim.base_lr is 0.2 there and 0.1 on rank 0; nothing was trained",
        f"UserError: {start}: the extra is 3 there and not known on rank 0; nothing was trained",
        f"RunFailed: {start}: checkpoint is 'step 1' there and 'step 0' on rank 0; nothing was",
        f"UserError: {start}: the checksum of weight is",
        f"RunFailed: {start}: its encoder.safetensors is 'absent' there and 'present' on rank 0",
        "equal",  # NaN is not a difference
        f"UserError: {start}: scale is 0.30000000000000004 there and 0.3 on rank 0",
        f"UserError: {start}: size is 32.0 there and 32 on rank 0",
        f"UserError: {start}: name is 'a\\x1b[2J' there and 'a' on rank 0",
        f"UserError: {start}: the checksum of running_mean is",
        "equal",
    ]
    for rank in range(2):
        for sentence, begin in zip(found[rank], expected, strict=False):
            assert sentence.startswith(begin), (rank, sentence)
    own, others = (
        ("UserError: no data\x1b[2J here", "RunFailed: disk"),
        [
            f"UserError: rank 1 (on {NODE}) failed: no data\x1b[2J here",
            f"RunFailed: rank 0 (on {NODE}) failed: disk",
        ],
    )
    assert found[0][12:] == [others[0], own[1], "equal", "equal"]
    assert found[1][12:] == [own[0], others[1], "equal", "equal"]


def test_one_rank_agrees_with_itself_and_raises_its_own_error() -> None:
    world = DistributedContext(0, 1, torch.device("cpu"))
    check_ranks_agree({"seed": 1}, world)
    with pytest.raises(UserError, match="mine"), fail_together(world):
        raise UserError("mine")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_digest_depends_on_every_value_and_its_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    variants = [tensor, tensor.clone(), tensor.clone(), torch.tensor(1).to(dtype)]
    variants[1][2, 3] = 0
    variants[2][0] = tensor[1].flip(0)
    digests = tensor_digests(dict(enumerate(variants)))
    assert len(set(digests.values())) == 4
    assert tensor_digests({0: tensor.T.contiguous().T})[0] == digests[0]  # however it is laid out


def test_code_version_covers_the_sources_and_the_libraries() -> None:
    found = code_version("finetune")
    assert found["torch"] in torch.__version__
    assert found["the code of mae_et"] != found["the code of finetune"]


def test_code_has_one_digest_in_a_clone_and_in_the_copy_for_a_job(tmp_path: Path) -> None:
    copy = snapshot(tmp_path) / "mae_et"
    (copy / "benchmarks").mkdir(exist_ok=True)
    (copy / "benchmarks" / "more.py").touch()
    assert source_digest(copy) == code_version("mae_et")["the code of mae_et"]
    (copy / "training" / "step.py").write_text("")
    assert source_digest(copy) != code_version("mae_et")["the code of mae_et"]
