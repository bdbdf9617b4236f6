"""Copy the code beside the run, so that edits do not change a pending job."""

import hashlib
import shutil
import uuid
from importlib.util import find_spec
from pathlib import Path

import finetune
import mae_et
import slurm
from mae_et.config.shipped import shipped_configs
from mae_et.runtime.commit import RECORD, code_commit

IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def snapshot(folder: Path) -> Path:
    """Copy this project's packages to a folder named by their content, and return it.

    The same code of the same commit is copied once. Dependencies (torch, timm) are not copied.
    """
    packages = {
        package.__name__: Path(package.__path__[0]) for package in (mae_et, finetune, slurm)
    }
    # In a clone these two lie beside the packages; in an installed wheel, inside mae_et.
    packages["mae_et/configs"] = shipped_configs()
    benchmarks = find_spec("mae_et.benchmarks")
    if benchmarks is not None and benchmarks.submodule_search_locations:
        packages["mae_et/benchmarks"] = Path(benchmarks.submodule_search_locations[0])
    temporary = folder / f".code-{uuid.uuid4().hex}"
    for name, source in packages.items():
        shutil.copytree(source, temporary / name, ignore=IGNORED, dirs_exist_ok=True)
    if commit := code_commit():
        (temporary / "mae_et" / RECORD).write_text(commit)
    target = folder / f"code-{_digest(temporary)}"
    try:
        temporary.rename(target)
    except OSError:  # it is there already, or another submission copies it at the same time
        if not target.is_dir():
            raise
        shutil.rmtree(temporary)
    return target


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
