"""The run logger: TensorBoard files, read back by TensorBoard's reader, and the terminal."""

import io
import re
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import read_image

from mae_et.curriculum.schedule import Curriculum
from mae_et.io.metrics_file import read_metrics
from mae_et.monitoring.logger import RunLogger
from mae_et.monitoring.tensorboard import TAGS, USUALLY_ZERO
from mae_et.monitoring.terminal import WIDTH, Terminal, describe


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_tensorboard_has_the_config(trained: Path) -> None:
    text = events(trained).Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "mask_ratio: 0.75" in text


def test_an_image_has_input_mask_reconstruction_and_paste(trained: Path) -> None:
    """Four panels per row; the second and the fourth share the visible patches."""
    image = read_image(str(sorted((trained / "reconstructions").glob("*.png"))[-1])).float()
    panel = 96  # 32 pixels, enlarged three times
    image = image[:, -(2 * (panel + 4) + 4) :]  # without the captions
    assert image.shape == (3, 2 * (panel + 4) + 4, 4 * (panel + 4) + 4)
    panels = [image[:, 4 : 4 + panel, 4 + i * (panel + 4) :][..., :panel] for i in range(4)]
    visible = (panels[1] == panels[0]).all(0)
    assert 0.2 < visible.float().mean() < 0.35
    assert torch.equal(panels[3][:, visible], panels[0][:, visible])
    assert (panels[1][:, ~visible] == 128).float().mean() > 0.95


def test_resuming_drops_later_rows_and_half_a_line(tiny) -> None:
    config = tiny("--output.tensorboard=false")
    plan = Curriculum.preset("constant", 32, 8).plan(5, 40, 12)
    row = dict.fromkeys(TAGS, 1.0) | {"stage": 0, "bandwidth": 32, "compute": 0.5, "seconds": 1.0}
    for start, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        logger = RunLogger(config, plan, start)
        for step in steps:
            logger.log(row | {"step": step})
        logger.close()
        with (config.output.dir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "lo')  # killed in the middle of a line
    assert [r["step"] for r in read_metrics(config.output.dir)] == [2, 4, 6, 8]


def test_a_terminal_shows_a_bar_and_a_log_has_lines(tiny, capsys, monkeypatch) -> None:
    plan = Curriculum.preset("etpp", 32, 8).plan(5, 400, 12)
    line = {
        "step": 7, "stage": 1, "bandwidth": 16, "loss": 0.5, "lr": 1e-3, "images_per_second": 99.6,
        "data_time_fraction": 0.25, "seconds": 30.0, "compute": 0.25, "time": 0.0,
    }  # fmt: skip
    text = describe(line, plan)
    for part in ("step 7/", "stage 2/10 B=16", "loss 0.5000", "100 img/s", "wait 25%", "0:01:30"):
        assert part in text
    rest = dict.fromkeys(TAGS, 0.0) | {"equivalent_epochs": 0.0}
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer, raising=False)
        logger = RunLogger(tiny("--output.tensorboard=false"), plan, 0)
        logger.log(rest | line)
        logger.close()
        shown = capsys.readouterr().err
        assert ("\r" in shown) == is_terminal
        assert shown.count("ETA") == shown.count("loss 0.5")
        assert "B=16" in shown


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_fits_80_columns_and_moves_between_rows(monkeypatch) -> None:
    """Also at the largest numbers of a real run; with one ETA."""
    plan = Curriculum.preset("etpp", 224, 16).plan(1600, 1_281_167, 4096)
    row = {
        "step": plan.steps // 2, "stage": 9, "bandwidth": 224, "loss": 0.41234, "lr": 1e-3,
        "images_per_second": 123456.7, "data_time_fraction": 0.25, "seconds": 9e5, "compute": 0.5,
        "spike": True,
    }  # fmt: skip
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    terminal = Terminal(plan, 0)
    terminal.bar.mininterval = 0  # real time would make the test wait a second for each step
    terminal.show_metrics(row)
    terminal.advance(row["step"] + 1)
    shown = re.split(r"[\r\n]", sys.stderr.getvalue())
    terminal.close()
    assert max(map(len, shown)) <= WIDTH == 80
    assert "ETA 250:00:00" in shown[-1]
    assert shown[-1].count(":") == 2  # no other time
    assert f"{row['step'] + 1}/{plan.steps} |" in shown[-1]
    assert "loss spike" in shown[-1]


def test_charts_that_would_always_be_zero_are_not_written(tiny) -> None:
    """Counts of faults appear with the first fault, the magnitude if data are augmented."""
    plan = Curriculum.preset("constant", 32, 8).plan(5, 40, 12)
    base = dict.fromkeys(TAGS, 1.0) | {"stage": 0, "bandwidth": 32, "compute": 0.5, "seconds": 1.0}
    base |= dict.fromkeys(USUALLY_ZERO, 0)
    for flags, magnitudes in (([], False), (["--data.augment=rand-mstd0.5"], True)):
        config = tiny(f"--output.dir={tiny().output.dir}{magnitudes}", *flags)
        for start, faults in ((0, [0, 0]), (4, [1, 0])):  # resumed before the first fault
            logger = RunLogger(config, plan, start)
            for place, count in enumerate(faults, 1):
                logger.log(base | {"step": start + 2 * place, "skipped_updates": count})
            logger.close()
        found = events(config.output.dir)
        tags = set(found.Tags()["scalars"])
        assert [s.step for s in found.Scalars("training/skipped_updates")] == [6, 8]
        assert not {"training/substituted_images", "training/unreadable_images"} & tags
        assert ("schedule/magnitude" in tags) == magnitudes


def test_hparams_lists_varied_keys_and_final_figures_first(tiny, tmp_path: Path) -> None:
    """As TensorBoard's own HPARAMS backend sorts them: it preselects five of each."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, list_session_groups
    from tensorboard.plugins.hparams.backend_context import Context

    plan = Curriculum.preset("constant", 32, 8).plan(5, 40, 12)
    row = dict.fromkeys(TAGS, 1.0) | {"stage": 0, "bandwidth": 32, "step": plan.steps}
    for name, flags in (("a", []), ("b", ["--optim.base_lr=0.5", "--seed=7"])):
        logger = RunLogger(tiny(f"--output.dir={tmp_path / name}", *flags), plan, 0)
        logger.log(row | {"compute": 1.0, "seconds": 1.0})
        logger.log_results(dict.fromkeys(("loss", "images", "steps", "training_seconds"), 1.0))
        logger.close()
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = Context(TBContext(data_provider=provider))
    request = RequestContext()
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""),
        context.hparams_from_data_provider(request, "", limit=None),
    )  # fmt: skip
    columns = [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    groups = api_pb2.ListSessionGroupsRequest(
        slice_size=10, allowed_statuses=api_pb2.Status.values(), col_params=columns
    )
    found = list_session_groups.Handler(request, context, "", groups).run()
    assert [len(group.metric_values) for group in found.session_groups] == [len(columns)] * 2
    keys = [(info.name, info.differs) for info in experiment.hparam_infos]
    assert keys[:2] == [("optim.base_lr", True), ("seed", True)]
    assert not any(differs for _, differs in keys[2:])
    assert [info.name.tag for info in experiment.metric_infos][:4] == [
        "loss/train", "results/images", "results/loss", "results/training_seconds",
    ]  # fmt: skip
