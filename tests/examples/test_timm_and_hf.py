import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "timm_and_hf.py"


def test_features_survive_timm_and_transformers_and_the_way_back(tmp_path: Path) -> None:
    example = runpy.run_path(str(SCRIPT))
    run = example["pretrain_tiny"](tmp_path / "run")
    differences = example["largest_differences"](run, tmp_path)
    assert set(differences) == {"timm", "transformers", "timm and back", "transformers and back"}
    assert all(difference < 1e-5 for difference in differences.values())
