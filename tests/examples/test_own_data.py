"""Run the notebook's code cells in order, as Jupyter would, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "own_data.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = "\n\n".join([*code, 'preview.save("preview.png")'])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(NOTEBOOK.parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "200 files in images" in done.stdout
    assert "kNN accuracy" in done.stdout
    assert "(8, 64)" in done.stdout
    assert Image.open(tmp_path / "preview.png").size == (8 * 64, 32 + 48 + 64)
    assert (tmp_path / "reconstruction.png").is_file()


def test_the_notebook_is_committed_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
