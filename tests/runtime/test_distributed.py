"""Collectives with a single rank."""

import signal
import socket
import threading
from concurrent.futures import Future
from unittest.mock import MagicMock

import pytest
import torch

from mae_et.errors import RunFailed
from mae_et.runtime import distributed, rendezvous
from mae_et.runtime.distributed import DistributedContext, wait_for_main


@pytest.fixture
def two_ranks(monkeypatch) -> int:
    """Environment of rank 0 of two, with a free port, and joins that give up after a second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(rendezvous, "PATIENCE_MARGIN", 0)
    return port


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_whose_peer_never_joins_reports_the_wait_and_ends(
    two_ranks: int, monkeypatch, capsys, rank: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.1)
    sentence = rf"^rank {rank} could not join 2 ranks at 127\.0\.0\.1:{two_ranks}: .*(T|t)imed out"
    with pytest.raises(RunFailed, match=sentence):
        distributed.initialize("cpu", patience=1)
    said = f"mae-et: rank {rank} is waiting for 2 ranks at 127.0.0.1:{two_ranks}\n"
    assert capsys.readouterr().err.startswith(said)


def test_a_thread_that_still_joins_does_not_outlive_its_process(two_ranks, monkeypatch) -> None:
    """Python's end would make torch's C++ abort in it, with status 134."""
    at_exit, statuses, joined = [], [], threading.Event()
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: joined.wait())
    monkeypatch.setattr(rendezvous.atexit, "register", lambda *call: at_exit.append(call))
    monkeypatch.setattr(rendezvous.os, "_exit", statuses.append)
    with pytest.raises(RunFailed, match=r"timed out after 0\.1 s"):
        distributed.initialize("cpu", patience=0.1)
    ((end, thread),) = at_exit
    end(thread)
    assert statuses == [1]
    joined.set()
    thread.join()
    end(thread)
    assert statuses == [1]


def test_port_in_use_is_reported_at_once(two_ranks: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", two_ranks))
        other.listen()
        with pytest.raises(RunFailed, match=rf"rank 0 could not join .*:{two_ranks}: .*EADDRINUSE"):
            distributed.initialize("cpu", patience=1)


def test_a_flag_of_a_rank_is_exchanged_in_the_background(monkeypatch) -> None:
    """Read at the start; with a single rank, which has no exchange to hide, at the end."""
    raised: list[int] = []
    exchange, awaited = MagicMock(), []
    exchange.wait = lambda: awaited.append(len(raised))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda *_, async_op: exchange)
    for ranks in (1, 2):
        world = DistributedContext(0, ranks, torch.device("cpu"))
        answer = distributed.any_rank_async(lambda: bool(raised), world)
        raised.append(signal.SIGTERM)
        assert answer() is (ranks == 1)
        raised.clear()
    assert awaited == [1]


@pytest.mark.parametrize("before", [True, False])
def test_only_a_group_that_a_command_joined_ends_with_it(
    two_ranks, monkeypatch, before: bool
) -> None:
    """That of a loop of the user's, in which `mae_et.pretrain` is called, stays."""
    monkeypatch.setenv("RANK", "0")
    ended: list[bool] = []
    for name, answer in {"is_initialized": before, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(distributed.dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: ended.append(True))
    distributed.shutdown(distributed.initialize("cpu", patience=1))
    assert ended == [True] * (not before)


def test_ranks_wait_for_long_work_of_the_main_rank_without_being_ended(monkeypatch) -> None:
    """Its own watchdog sees only the heartbeats of the work: a save that hangs still ends it."""
    cpu, beats = torch.device("cpu"), []
    monkeypatch.setattr(distributed, "heartbeat", lambda: beats.append(1))
    busy = iter([True, True, True, False])
    monkeypatch.setattr(distributed, "any_rank", lambda flag, _: next(busy))
    wait_for_main(None, DistributedContext(1, 2, cpu))
    assert len(beats) == 3

    monkeypatch.setattr(distributed, "any_rank", lambda flag, _: flag)
    work: Future[None] = Future()
    error = OSError(28, "No space left on device")
    threading.Timer(0.1, work.set_exception, [error]).start()
    with pytest.raises(OSError, match="No space left"):
        wait_for_main(work, DistributedContext(0, 2, cpu), poll=0.01)
    assert len(beats) == 3
