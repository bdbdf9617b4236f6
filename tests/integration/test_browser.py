"""TensorBoard in a real browser, on a finished run and on one that is resumed.

Skipped without Chromium (`apt-get install chromium`).
"""

import json
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from browser import chromium, tensorboard
from interruptions import ENDS, run_until
from tiny_run import IMAGES, config_in

from mae_et import pretrain
from mae_et.io.metrics_file import read_metrics

pytestmark = pytest.mark.slow


def test_tensorboard_shows_curves_reconstructions_and_hyper_parameters(tmp_path: Path) -> None:
    run = pretrain(config_in(tmp_path, IMAGES))
    last = read_metrics(run)[-1]
    with tensorboard(tmp_path) as url, chromium(viewport={"width": 2200, "height": 900}) as page:

        def look(place: str) -> None:
            page.goto("about:blank")  # otherwise the page keeps its filter
            page.goto(f"{url}/{place}")

        for tag, key in (
            ("loss/train", "loss"),
            ("vs_compute/loss", "loss"),
            ("schedule/bandwidth", "bandwidth"),
        ):
            look(f"?tagFilter=^{tag}$&smoothing=0#timeseries")
            card = page.locator("scalar-card", has_text=tag)
            card.locator("svg path, canvas").first.wait_for(state="attached")
            # The table below the curve: the value at the last step, to four digits.
            value = f"{last[key]:.4f}" if key == "loss" else f"{last[key]}"
            step = last["step"] if "compute" not in tag else round(1000 * last["equivalent_epochs"])
            row = card.locator("tb-data-table-content-row", has_text=f"{step:,}")
            row.get_by_text(value).first.wait_for()

        look("?tagFilter=^reconstructions$#timeseries")
        image = page.locator("image-card img").first
        image.wait_for()
        page.wait_for_function("image => image.naturalWidth > 0", arg=image.element_handle())
        assert image.evaluate("image => image.naturalWidth") == 4 * (96 + 4) + 4

        look("#hparams")
        for text in ("crop.method", "fourier", "curriculum.preset", "results/loss"):
            page.get_by_text(text, exact=True).first.wait_for()
        # Hyper-parameters are rounded to five digits there.
        page.get_by_text(f"{last['loss']:.5g}", exact=True).first.wait_for()


@pytest.mark.parametrize("reader", ["true", "false"], ids=["fast reader", "Python's reader"])
def test_an_open_tensorboard_follows_a_resumed_run(tmp_path: Path, reader: str) -> None:
    """It shows no step twice, and none after the checkpoint that the run resumed from."""
    config = config_in(tmp_path)
    folder = config.output.dir
    folder.mkdir()
    with tensorboard(folder, f"--load_fast={reader}") as url:

        def steps() -> list[int]:
            address = f"{url}/data/plugin/scalars/scalars?run=.&tag=loss/train"
            try:
                with urlopen(address) as answer:
                    return [point[1] for point in json.load(answer)]
            except OSError:  # nothing was read yet
                return []

        for end in (*ENDS, None):
            run_until(config, tmp_path / "notes", end)
            expected = [row["step"] for row in read_metrics(folder)]
            patience = time.monotonic() + 30
            while steps() != expected and time.monotonic() < patience:
                time.sleep(0.5)
            assert steps() == expected
