"""What the screen shows is what was computed; TensorBoard's own reader reads it back."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import read_image

from mae_et import pretrain
from mae_et.curriculum.schedule import Curriculum
from mae_et.io.metrics_file import SCORES, read_metrics
from mae_et.monitoring.logger import TAGS, RunLogger, describe
from mae_et.monitoring.progress import format_seconds, seconds_left


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    from tiny_run import TINY

    from mae_et import PretrainConfig, load_config

    folder = tmp_path_factory.mktemp("monitor")
    (folder / "tiny.yaml").write_text(TINY)
    return pretrain(
        load_config(PretrainConfig, [folder / "tiny.yaml"], [f"--output.dir={folder}/run"])
    )


def test_every_number_of_a_row_stands_in_tensorboard_against_its_step(run: Path) -> None:
    rows, found = read_metrics(run), events(run)
    for key, tag in TAGS.items():
        scalars = found.Scalars(tag)
        assert [s.step for s in scalars] == [row["step"] for row in rows]
        assert [s.value for s in scalars] == pytest.approx([row[key] for row in rows], rel=1e-6)


def test_the_same_curves_stand_against_compute_in_thousandths_of_an_epoch(run: Path) -> None:
    rows, found = read_metrics(run), events(run)
    scalars = found.Scalars("loss_by_compute/train")
    assert [s.step for s in scalars] == [round(1000 * row["equivalent_epochs"]) for row in rows]
    assert [s.value for s in scalars] == pytest.approx([row["loss"] for row in rows], rel=1e-6)


def test_each_stage_has_a_curve_of_its_own(run: Path) -> None:
    rows, found = read_metrics(run), events(run)
    for stage, bandwidth in enumerate((16, 24, 32)):
        scalars = found.Scalars(f"loss/stage_{stage + 1}_B{bandwidth}")
        mine = [row for row in rows if row["stage"] == stage]
        assert [s.step for s in scalars] == [row["step"] for row in mine]
        assert [s.value for s in scalars] == pytest.approx([row["loss"] for row in mine], rel=1e-6)


def test_config_pictures_and_final_figures_are_there(run: Path) -> None:
    found = events(run)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "mask_ratio: 0.75" in text
    pictures = sorted((run / "reconstructions").glob("*.png"))
    assert [image.step for image in found.Images("reconstructions")] == [
        int(path.stem.removeprefix("step-")) for path in pictures
    ]
    results = json.loads((run / "results.json").read_text())
    assert found.Scalars("summary/loss")[0].value == pytest.approx(results["loss"], rel=1e-6)
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"model.mask_ratio" in content


def test_a_picture_shows_input_mask_reconstruction_and_paste(run: Path) -> None:
    """Four panels a row; with the same visible patches in the second and the fourth."""
    picture = read_image(str(sorted((run / "reconstructions").glob("*.png"))[-1])).float()
    panel = 96  # 32 pixels, enlarged three times
    assert picture.shape == (3, 2 * (panel + 4) + 4, 4 * (panel + 4) + 4)
    panels = [picture[:, 4 : 4 + panel, 4 + i * (panel + 4) :][..., :panel] for i in range(4)]
    visible = (panels[1] == panels[0]).all(0)
    assert 0.2 < visible.float().mean() < 0.35
    assert torch.equal(panels[3][:, visible], panels[0][:, visible])
    assert (panels[1][:, ~visible] == 128).float().mean() > 0.95


def test_a_run_that_goes_on_doubles_no_step_and_drops_rows_after_its_checkpoint(tiny) -> None:
    config = tiny()
    plan = Curriculum.preset("constant", 32, 8).plan(5, 40, 12)

    def row(step: int) -> dict:
        keys = dict.fromkeys(TAGS, 1.0 * step) | {"stage": 0, "compute": 0.5, "seconds": 1.0}
        return keys | {"step": step, "bandwidth": 32, "equivalent_epochs": step / 10}

    def watch(start: int, steps: list[int]) -> None:
        monitor = RunLogger(config, plan, start)
        for step in steps:
            monitor.log(row(step))
            monitor.picture(step, torch.zeros(3, 8, 8, dtype=torch.uint8))
        monitor.close()

    watch(0, [2, 4, 6])
    with (config.output.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    watch(4, [6, 8])
    assert [r["step"] for r in read_metrics(config.output.dir)] == [2, 4, 6, 8]
    sizes = [path.stat().st_size for path in config.output.dir.glob("events.out.tfevents.*")]
    assert sum(size > 0 for size in sizes) == 1
    found = events(config.output.dir)
    assert [s.step for s in found.Scalars("loss/train")] == [2, 4, 6, 8]
    assert [s.step for s in found.Scalars("loss_by_compute/train")] == [200, 400, 600, 800]
    assert [i.step for i in found.Images("reconstructions")] == [2, 4, 6, 8]


def test_scores_stand_against_step_and_compute_and_survive_going_on(tiny) -> None:
    config = tiny()
    plan = Curriculum.preset("etpp", 32, 8).plan(6, 40, 4)
    for start, steps in ((0, [10, 20]), (10, [20, 30])):
        monitor = RunLogger(config, plan, start)
        for step in steps:
            monitor.score(step, {"top1": float(step)})
        monitor.close()
    assert [row["step"] for row in read_metrics(config.output.dir, SCORES)] == [10, 20, 30]
    found = events(config.output.dir)
    assert [(s.step, s.value) for s in found.Scalars("validation/top1")] == [
        (10, 10), (20, 20), (30, 30),
    ]  # fmt: skip
    done = [round(1000 * plan.progress(step) * plan.equivalent_epochs) for step in (10, 20, 30)]
    assert [s.step for s in found.Scalars("validation_by_compute/top1")] == done
    seen = [step * plan.batch_size for step in (10, 20, 30)]
    assert [s.step for s in found.Scalars("validation_by_images/top1")] == seen


def test_a_terminal_gets_a_bar_and_a_log_gets_lines(tiny, capsys, monkeypatch) -> None:
    plan = Curriculum.preset("etpp", 32, 8).plan(5, 400, 12)
    line = {
        "step": 7, "stage": 1, "bandwidth": 16, "loss": 0.5, "lr": 1e-3, "images_per_second": 99.6,
        "data_time_fraction": 0.25, "seconds": 30.0, "compute": 0.25, "time": 0.0,
    }  # fmt: skip
    text = describe(line, plan)
    for part in ("step 7/", "stage 2/10 B=16", "loss 0.5000", "100 img/s", "wait 25%", "0:01:30"):
        assert part in text
    assert format_seconds(3 * 3600 + 62) == "3:01:02"
    rest = dict.fromkeys(TAGS, 0.0) | {"equivalent_epochs": 0.0}
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer, raising=False)
        monitor = RunLogger(tiny("--output.tensorboard=false"), plan, 0)
        monitor.log(rest | line)
        monitor.close()
        shown = capsys.readouterr().err
        assert ("it/s" in shown or "step/s" in shown or "s/step" in shown) == is_terminal
        assert "B=16" in shown


def test_remaining_time_scales_with_remaining_compute() -> None:
    assert seconds_left({"seconds": 100.0, "compute": 0.25}) == 300
    assert format_seconds(3661.4) == "1:01:01"
