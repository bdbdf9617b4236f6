"""A wheel works outside of the checkout, its configs included."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """Build a wheel from a copy of what git tracks, and unpack it as installing would."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "mae_et",
         "finetune", "slurm", "configs", "benchmarks/*.py", "benchmarks/*.yaml",
         "setup.cfg", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    if not listing:
        pytest.skip("not a git checkout, so what belongs to the package is not known")
    for name in listing.rstrip("\0").split("\0"):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", folder, folder / "source"], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_finds_its_own_configs(unpacked: Path) -> None:
    assert (unpacked / "mae_et" / "monitoring" / "report" / "page.html").is_file()
    words = ["plan", "--config=pretrain/vit_b16_etpp", "--curriculum.cost=area", "--json"]
    program = f"import mae_et.cli.main as found; print(found.__file__); found.main({words})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=unpacked.parent, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(unpacked)}, check=True,
    )  # fmt: skip
    where, plan = done.stdout.splitlines()
    assert Path(where).is_relative_to(unpacked)
    assert json.loads(plan)["speedup"] == pytest.approx(4, rel=0.01)


def test_the_wheel_holds_every_config_and_module_and_nothing_else(unpacked: Path) -> None:
    tracked = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    shipped = unpacked / "mae_et" / "configs"
    assert {p.relative_to(shipped) for p in shipped.rglob("*.yaml")} == tracked
    tops = {p.name for p in unpacked.iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        "mae_et", "finetune", "slurm",
    }  # fmt: skip
    for package in ("mae_et", "finetune", "slurm"):
        ours = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py")}
        found = {p.relative_to(unpacked) for p in (unpacked / package).rglob("*.py")}
        added = {
            p for p in found if p.parts[:2] in {("mae_et", "configs"), ("mae_et", "benchmarks")}
        }
        assert found - added == ours
    measured = {p.name for p in (ROOT / "benchmarks").glob("*.py")}
    assert {p.name for p in (unpacked / "mae_et" / "benchmarks").glob("*.py")} == measured
    (info,) = unpacked.glob("*.dist-info")
    assert "mae-et = mae_et.__main__:main" in (info / "entry_points.txt").read_text()


def test_git_tracks_no_output_of_a_run() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    names = [Path(name) for name in listing.split("\0") if not name.startswith("tests/golden/")]
    outputs = {".lock", "results.json", "metrics.jsonl", "encoder.safetensors"}
    assert not [
        name for name in names if name.name in outputs or re.fullmatch(r"step-\d+\.pt", name.name)
    ]
