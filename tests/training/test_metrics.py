"""Summaries of a run from its logged rows."""

import time

import pytest
import torch

from mae_et import Curriculum
from mae_et.monitoring.summaries import summarise_stages
from mae_et.training.metrics import MetricsWindow, peak_memory


def test_stage_summaries_count_planned_images_and_average_logged_rows() -> None:
    plan = Curriculum.preset("constant", 64, 8).plan(2, 100, 10)
    rows = [
        {"stage": 0, "window_steps": 2, "window_seconds": seconds, "loss": loss,
         "data_time_fraction": waited}
        for seconds, loss, waited in ((6.0, 3, 0.1), (2.0, 1, 0.9))
    ]  # fmt: skip
    (stage,) = summarise_stages(rows, plan)
    assert stage["data_time_fraction"] == 0.3
    assert stage["images"] == 200  # from the plan: a damaged disk may lose rows
    assert (stage["images_per_second"], stage["loss"]) == (5.0, 1)
    (lost,) = summarise_stages([], plan)
    assert (lost["images"], lost["images_per_second"], lost["loss"]) == (200, None, None)
    assert lost["data_time_fraction"] is None


def test_peak_memory_on_a_cpu_is_in_bytes() -> None:
    assert peak_memory(torch.device("cpu")) > 2**20  # this process uses more than a MiB


@pytest.mark.parametrize("works", [True, False])
def test_pause_waits_for_the_gpu_only_where_it_gets_work(monkeypatch, works: bool) -> None:
    """Steps queued before the pause count as training; what is queued in it does not."""
    window = MetricsWindow(torch.device("cpu"))
    window.device, began = torch.device("cuda"), window.started
    clock, waits = [began], [3.0, 5.0]  # seconds of queued work

    def synchronise(_: torch.device) -> None:
        clock[0] += waits.pop(0)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronise)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with window.paused(works):
        clock[0] += 100
    assert clock[0] - window.started == (3 if works else 0)
    assert waits == ([] if works else [3.0, 5.0])
