"""The files that others install from agree with setup.cfg, and the reference page with the code."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import finetune
import mae_et
import slurm

ROOT = Path(__file__).parents[2]


def declared() -> dict[str, list[Requirement]]:
    """Return the requirements of setup.cfg: of the package, and of each extra."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {
        extra: [Requirement(line) for line in text.split("\n") if line]
        for extra, text in texts.items()
    }


def pinned(name: str) -> dict[str, str]:
    """Return the versions of a file of constraints, by lower-case name."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins.items()}


def key(requirement: Requirement) -> str:
    return re.sub("[-_.]+", "-", requirement.name).lower()


def lower_bound(requirement: Requirement) -> str:
    return next(s.version for s in requirement.specifier if s.operator == ">=")


@pytest.mark.parametrize("extra", declared())
def test_every_dependency_has_a_lower_and_an_upper_bound(extra):
    for requirement in declared()[extra]:
        assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement


def test_lock_has_a_version_within_the_bounds_for_everything_that_make_test_installs():
    lock = pinned("lock.txt")
    for requirement in [r for extra in ("", "dev", "docs") for r in declared()[extra]]:
        if key(requirement) != "setuptools":  # pip freeze does not list it
            assert requirement.specifier.contains(lock[key(requirement)]), requirement


def test_lowest_versions_are_the_lower_bounds():
    lowest = pinned("lowest.txt")
    runtime = {
        key(r): r for extra in ("", "hf", "parquet", "fast", "search") for r in declared()[extra]
    }
    assert lowest.keys() == runtime.keys()
    for name, version in lowest.items():
        assert re.fullmatch(rf"{re.escape(lower_bound(runtime[name]))}(\.0)*", version), name


def test_containers_copy_all_that_the_build_reads():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = dict(
        line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line
    )
    packages = [line for line in setup["options"]["packages"].split("\n") if line]
    needed = {folders.get(name, name).split("/")[0].split(".")[0] for name in packages}
    needed |= {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "requirements"}
    docker = (ROOT / "Dockerfile").read_text()
    copied = {
        name for line in re.findall(r"^COPY (.*) /src", docker, re.M) for name in line.split()
    }
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M))
    apptainer = (ROOT / "apptainer.def").read_text()
    assert copied == allowed == set(re.findall(r"^ +(\S+) /src/\1$", apptainer, re.M)) == needed


def test_conda_environment_installs_the_package_under_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry for entry in environment["dependencies"] if isinstance(entry, dict))["pip"]
    assert pip[0] == "--constraint requirements/lock.txt"
    assert (ROOT / pip[0].split()[1]).is_file()
    extras = re.fullmatch(r"--editable \.\[(.*)\]", pip[1])
    assert extras
    assert set(extras[1].split(",")) <= declared().keys()


def test_site_has_every_page_of_the_documentation() -> None:
    listed = set(re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed, "add them to nav in mkdocs.yml"


def test_reference_page_describes_every_public_name_once():
    page = (ROOT / "docs/site/python.md").read_text()
    packages = mae_et, finetune, slurm
    public = {f"{package.__name__}.{n}" for package in packages for n in package.__all__}
    described = re.findall(r"^::: (\S+)$", page, re.M)
    assert sorted(described) == sorted(public)
