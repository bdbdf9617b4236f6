"""Run the notebook's code cells in order, as Jupyter would."""

import json
from pathlib import Path

from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "examples" / "own_data.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGES", raising=False)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    exec("\n\n".join([*code, 'preview.save("preview.png")']), {})
    said = capsys.readouterr().out
    for part in ("200 files in images", "kNN accuracy", "(8, 64)"):
        assert part in said
    assert Image.open(tmp_path / "preview.png").size == (8 * 64, 32 + 48 + 64)
    assert (tmp_path / "reconstruction.png").is_file()


def test_the_notebook_is_committed_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
