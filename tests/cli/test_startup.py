"""Commands that compute nothing import no PyTorch, which takes seconds and most of a gigabyte."""

import shutil
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "timm", "torchvision", "tensorboard", "transformers")


COMMANDS = (
    ("--version", 0),
    ("--help", 0),
    ("pretrain --help", 0),
    ("knn --help", 0),
    ("pretrain --optim.batch_sze 3", 2),
    ("pretrain --config finetune/vit_b16", 2),
    ("pretrain --model.mask_ratio 1", 2),
    ("plan --curriculum.epochs 0", 2),
    ("plan --config pretrain/vit_b16_etpp_400ep", 0),
    ("finetune --checkpoint runs/missing", 2),
    ("supervised --model.backbone resnet50 --optim.lr 1", 2),
    ("supervised --model.backbone resnet50 --data.name synthetic --optim.batch_size 9999", 2),
    ("pretrain --init run --model.mask_ratio 0.999", 2),
    ("knn --checkpoint x --neighbors 3", 2),
    ("evaluate --checkpoint x --batch_size 0", 2),
    ("dynamics --checkpoint x --images 0", 2),
    ("reconstruct --checkpoint x --count 0", 2),
    ("export --checkpoint x", 2),
    ("prepare --output x --quality 101", 2),
    ("search --search.stages 0", 2),
    ("submit pretrain --optim.lr 3", 2),
    ("submit pretrain --config demo --cluster cpu --dry-run", 0),
    ("status nowhere", 2),
    ("compare nowhere", 2),
    ("report nowhere", 2),
    # Of a finished run.
    ("status run", 0),
    ("compare run", 0),
    ("report run", 0),
)


def heavy_modules_after(lines: list[str], cwd: Path) -> list[tuple[str, object, list[str]]]:
    """Evaluate lines in one fresh interpreter; return each, its value and the heavy modules."""
    script = f"""
import sys
from mae_et.cli.main import main

found = []
for line in {lines}:
    value = eval(line)
    found.append((line, value, [name for name in {HEAVY} if name in sys.modules]))
print(found)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, check=True
    )
    return eval(done.stdout.splitlines()[-1])


def test_commands_and_exports_that_compute_nothing_import_no_pytorch(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    packages = ("mae_et", "finetune", "slurm", "mae_et.search")
    exports = [f"dir(__import__('{name}')) and None" for name in packages]
    exports += [f"__import__('mae_et').{name} and None" for name in ("load_config", "UserError")]
    exports.append(
        "(lambda o, m: o.open_early('demo', m.load_config(m.PretrainConfig, ['demo']), "
        "o.open_training_images))("
        "__import__('mae_et.training.opening').training.opening, __import__('mae_et')) and None"
    )
    exports.append(
        "__import__('mae_et.cli.commands', fromlist='_').config_of('finetune', ['run']) and None"
    )
    expected = [(line, None, []) for line in exports]
    expected += [(f"main({words.split()})", status, []) for words, status in COMMANDS]
    assert heavy_modules_after([line for line, *_ in expected], tmp_path) == expected
