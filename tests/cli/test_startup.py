"""Commands that compute nothing import no PyTorch, which takes seconds and most of a gigabyte."""

import subprocess
import sys
from pathlib import Path

import pytest

from mae_et import pretrain

HEAVY = ("torch", "timm", "torchvision", "tensorboard", "transformers")


def heavy_modules_after(code: str, cwd: Path) -> tuple[set[str], int | str]:
    """Run code in a fresh interpreter; return the heavy modules it imported and its status."""
    script = f"""
import sys
status = 0
try:
    {code}
except SystemExit as ended:
    status = ended.code
print([*(name for name in {HEAVY} if name in sys.modules), status])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, check=True
    )
    *heavy, status = eval(done.stdout.splitlines()[-1])
    return set(heavy), status


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--version", 0),
        ("--help", 0),
        ("pretrain --help", 0),
        ("knn --help", 0),
        ("pretrain --optim.batch_sze 3", 2),
        ("pretrain --config finetune/vit_b16", 2),
        ("pretrain --model.mask_ratio 1", 2),
        ("plan --curriculum.epochs 0", 2),
        ("finetune --checkpoint runs/missing", 2),
        ("supervised --model.backbone resnet50 --optim.lr 1", 2),
        ("knn --checkpoint x --neighbors 3", 2),
        ("evaluate --checkpoint x --batch_size 0", 2),
        ("dynamics --run x --images 0", 2),
        ("reconstruct --checkpoint x --count 0", 2),
        ("export --checkpoint x", 2),
        ("prepare --output x --quality 101", 2),
        ("search --search.stages 0", 2),
        ("submit pretrain --optim.lr 3", 2),
        ("submit pretrain --config demo --cluster cpu --dry-run", 0),
        ("status nowhere", 2),
        ("compare nowhere", 2),
        ("report nowhere", 2),
    ],
)
def test_commands_that_compute_nothing_import_no_pytorch(
    words: str, status: int, tmp_path: Path
) -> None:
    code = f"from mae_et.cli.main import main; status = main({words.split()!r})"
    assert heavy_modules_after(code, tmp_path) == (set(), status)


@pytest.mark.parametrize("command", ["status", "compare", "report"])
def test_records_of_a_run_are_read_without_pytorch(command: str, tiny, tmp_path: Path) -> None:
    folder = pretrain(tiny())
    code = f"from mae_et.cli.main import main; status = main([{command!r}, {str(folder)!r}])"
    assert heavy_modules_after(code, tmp_path) == (set(), 0)


@pytest.mark.parametrize("package", ["mae_et", "finetune", "slurm", "mae_et.search"])
def test_importing_a_package_root_imports_no_pytorch(package: str, tmp_path: Path) -> None:
    assert heavy_modules_after(f"import {package}; dir({package})", tmp_path) == (set(), 0)


def test_an_export_imports_what_it_needs_and_no_more(tmp_path: Path) -> None:
    code = "import mae_et; mae_et.load_config; mae_et.UserError; mae_et.Plan"
    assert heavy_modules_after(code, tmp_path) == (set(), 0)
    assert "torch" in heavy_modules_after("import mae_et; mae_et.hog", tmp_path)[0]
