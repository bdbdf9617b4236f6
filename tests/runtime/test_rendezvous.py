"""Ranks of one attempt of torchrun, which share a store with those of attempts before."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mae_et.errors import UserError
from mae_et.runtime import distributed
from mae_et.runtime.rendezvous import name_attempt

SIZE = 3


def attempt(store: dist.Store, order: tuple[int, ...]) -> list[str]:
    """Start ranks in an order, 0.1 s apart; return the names that they agree on."""
    with ThreadPoolExecutor(SIZE) as ranks:
        started = []
        for rank in order:
            started.append(ranks.submit(name_attempt, store, rank, SIZE, timedelta(seconds=10)))
            time.sleep(0.1)
        return [each.result() for each in started]


def test_ranks_of_an_attempt_agree_on_a_name_that_no_other_attempt_had() -> None:
    """Also where a rank reads what the rank 0 before left, or died before it was listed."""
    store = dist.HashStore()
    names = [attempt(store, order) for order in [(0, 1, 2), (1, 2, 0), (2, 0, 1)]]
    assert [len(set(each)) for each in names] == [1, 1, 1]
    assert len({each[0] for each in names}) == 3


def test_rank_whose_leader_never_comes_gives_up() -> None:
    """The one that left its name died."""
    store = dist.HashStore()
    attempt(store, (0, 1, 2))
    with pytest.raises(TimeoutError, match="rank 0 did not list rank 1"):
        name_attempt(store, 1, SIZE, timedelta(seconds=0.2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "two"), ("RANK", ""), ("MASTER_PORT", ""), ("MASTER_ADDR", "")],
)
def test_variables_that_no_launcher_sets_are_refused(name: str, value: str, monkeypatch) -> None:
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "here"}
    for each, given in (launched | {name: value}).items():
        monkeypatch.setenv(each, given)
    with pytest.raises(UserError, match=f"variable {name} is '{value}'"):
        distributed.initialize("cpu", patience=1)
