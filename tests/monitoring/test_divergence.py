"""Loss spikes are marked, and runs that do not train are reported."""

import json

import pytest
from steps import train_with

from mae_et import pretrain
from mae_et.io.metrics_file import read_metrics
from mae_et.monitoring.divergence import FEWEST, RECENT, has_diverged, is_spike
from mae_et.training.step import train_step


def rows(losses, stage: int = 0) -> list[dict]:
    return [{"loss": loss, "stage": stage} for loss in losses]


NOISY = [1.0 + 0.01 * ((7 * n) % 5 - 2) for n in range(30)]


@pytest.mark.parametrize(
    ("loss", "before", "expected"),
    [
        (1.02, rows(NOISY), False),
        (1.2, rows(NOISY), True),
        (0.2, rows(NOISY), False),  # a fall is not a spike
        (1.2, rows(NOISY[: FEWEST - 1]), False),  # too little is known
        (1.2, rows(NOISY, stage=1), False),  # of another stage
        (1.2, rows([*NOISY, *[9.0] * 5]), True),  # others do not hide it
        (1.2, rows([9.0] * 30 + NOISY[:RECENT]), True),  # what is long past does not either
        (1.005, rows([1.0] * 30), False),  # without any noise, a hundredth is let pass
        (1.02, rows([1.0] * 30), True),
        (None, rows(NOISY), False),
        (1.2, rows([None, *NOISY]), True),
    ],
)
def test_a_spike_is_a_loss_far_above_the_recent_losses_of_its_stage(
    loss, before, expected: bool
) -> None:
    assert is_spike({"loss": loss, "stage": 0}, before) is expected


def test_a_spike_is_marked_in_the_record_and_in_tensorboard(tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def leaping(run, *rest):
        loss, norm = train_step(run, *rest)
        return (loss * 3 if run.state.step == 19 else loss), norm

    flags = ["--output.log_every=1", "--curriculum.epochs=9", "--curriculum.preset=constant"]
    folder = train_with(leaping, tiny(*flags, "--curriculum.stages=[]"))
    assert [row["step"] for row in read_metrics(folder) if row["spike"]] == [20]
    assert json.loads((folder / "results.json").read_text())["loss_spikes"] == 1
    events = EventAccumulator(str(folder)).Reload()
    assert [scalar.step for scalar in events.Scalars("training/loss_spikes")] == [20]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 0.9, *[0.8] * 6], False),
        ([1.0, 0.9, *[1.1, 1.0] * 3], True),  # ends where it began
        ([1.0, 0.9, 1.1, 1.0, 1.1], False),  # too short to tell
        ([1.0, *[2.5] * 5], True),  # not so for this
        ([1.0, 0.9, *[2.5] * 5, *[0.5] * 20], True),  # was lost, and came back
        ([1.0, 0.9, 2.5, 30.0, *[0.5] * 20], False),  # a spike
        ([1.0], False),
    ],
)
def test_a_run_has_diverged_if_it_is_far_above_its_start_or_ends_no_lower(losses, expected) -> None:
    found = rows(losses)
    found[0]["loss_at_start"] = 1.0
    assert has_diverged(found) is expected


def test_a_diverging_run_is_distinguished_from_a_training_one(tiny, trained, capsys) -> None:
    flags = ["--optim.base_lr=30", "--curriculum.epochs=9", "--optim.warmup_fraction=0"]
    for folder, diverged in ((trained, False), (pretrain(tiny(*flags)), True)):
        assert json.loads((folder / "results.json").read_text())["diverged"] is diverged
        assert has_diverged(read_metrics(folder)) is diverged
    assert "the run diverged" in capsys.readouterr().err
