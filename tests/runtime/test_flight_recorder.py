"""A rank that hangs leaves its last NCCL collectives in the run folder."""

import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from mae_et.runtime import distributed, flight_recorder, watchdog
from mae_et.runtime.flight_recorder import PREFIX, record_collectives

NAMES = {
    "2.7.1": ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
    "2.8.0": ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
    "2.14.1": ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"),
}


@pytest.fixture(autouse=True)
def _environment_without_settings(monkeypatch) -> None:
    monkeypatch.setattr(flight_recorder, "_chosen", {})
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_FR", "TORCH_NCCL"))}
    monkeypatch.setattr(os, "environ", kept)


@pytest.mark.parametrize("version", NAMES)
def test_the_recorder_is_on_unless_the_environment_says_otherwise(monkeypatch, version) -> None:
    """Under the names of the version, whatever the name that the user has given."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    before = dict(os.environ)
    for folder in (Path("/runs/one"), Path("/runs/two")):  # of one process
        record_collectives(folder)
        added = {name: value for name, value in os.environ.items() if name not in before}
        entries, file = NAMES[version]
        dump = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
        assert added == {entries: "2000", file: f"{folder}/{PREFIX}"} | dump
    for old, new in zip(NAMES["2.7.1"], NAMES["2.8.0"], strict=True):
        for name in (old, new):
            monkeypatch.setattr(os, "environ", before | {name: "/mine"})
            monkeypatch.setattr(flight_recorder, "_chosen", {})
            record_collectives(Path("/runs/one"))
            assert os.environ[name] == "/mine"
            assert not {old, new} - {name} & set(os.environ)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_only_ranks_on_gpus_are_recorded(monkeypatch, tmp_path: Path, kind: str) -> None:
    folders: list[Path] = []
    os.environ |= {"WORLD_SIZE": "2"}
    monkeypatch.setattr(distributed, "choose_device", lambda _: torch.device(kind, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(distributed, "check_launch", lambda: None)
    monkeypatch.setattr(distributed, "join", lambda *_: None)
    monkeypatch.setattr(distributed, "record_collectives", folders.append)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    distributed.initialize("auto", 1, tmp_path)
    assert folders == [tmp_path] * (kind == "cuda")


@pytest.mark.parametrize("fails", [False, True])
def test_a_hang_dumps_the_collectives_of_its_rank(
    alone_in_a_group, monkeypatch, tmp_path: Path, capfd, fails: bool
) -> None:
    """A dump that fails, or hangs, does not keep the process from exiting."""
    if not hasattr(torch._C._distributed_c10d, "_dump_nccl_trace"):
        pytest.skip("this PyTorch is built without NCCL")
    statuses: list[int] = []
    alarms: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(signal, "alarm", alarms.append)
    monkeypatch.setattr(watchdog, "PEERS_SECONDS", 0)
    folder = tmp_path / "run"
    if not fails:
        folder.mkdir()
    with watchdog.hang_watchdog(0.2):
        record_collectives(folder)
        watchdog.heartbeat()
        while not statuses:
            time.sleep(0.01)
    assert statuses[0] == watchdog.EXIT_STATUS
    assert alarms[0] == watchdog.EXIT_SECONDS
    said = capfd.readouterr().err
    trace = folder / f"{PREFIX}0"
    assert (f"{trace} cannot be written: No such file" if fails else f"are in {trace} (") in said
    if not fails:
        assert [path.name for path in folder.iterdir()] == [trace.name]
        assert pickle.loads(trace.read_bytes())["entries"] == []
