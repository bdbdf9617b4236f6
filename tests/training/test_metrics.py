"""Summaries of a run from its logged rows."""

import torch

from mae_et import Curriculum
from mae_et.training.metrics import peak_memory, summarise_stages


def test_stage_summaries_count_planned_images_and_average_logged_rows() -> None:
    plan = Curriculum.preset("constant", 64, 8).plan(2, 100, 10)
    rows = [{"stage": 0, "window_steps": 2, "window_seconds": 4.0, "loss": loss} for loss in (3, 1)]
    (stage,) = summarise_stages(rows, plan)
    assert stage["images"] == 200  # from the plan: a damaged disk may lose rows
    assert (stage["images_per_second"], stage["loss"]) == (5.0, 1)
    (lost,) = summarise_stages([], plan)
    assert (lost["images"], lost["images_per_second"], lost["loss"]) == (200, None, None)


def test_peak_memory_on_a_cpu_is_in_bytes() -> None:
    assert peak_memory(torch.device("cpu")) > 2**20  # this process uses more than a MiB
