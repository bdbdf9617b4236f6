"""What the package roots export: for type checkers and at run time, with documentation."""

import ast
import configparser
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mae_et", "finetune", "slurm")


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_and_python_see_the_same_exports(package: str) -> None:
    tree = ast.parse((ROOT / package / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    seen = {(f"{package}.{node.module}", name.asname) for node in imports for name in node.names}
    root = importlib.import_module(package)
    assert {name for _, name in seen} == set(root.__all__) <= set(dir(root))
    for module, name in seen:
        assert getattr(root, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = root.nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_read_an_installed_package(package: str) -> None:
    """PEP 561: without py.typed in the wheel they ignore its annotations and its stub."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"][package] == "py.typed, *.pyi"
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_is_documented(package: str) -> None:
    root = importlib.import_module(package)
    for name in root.__all__:
        value = getattr(root, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{package}.{name}"
            assert not value.__doc__.startswith(f"{name}("), f"{package}.{name}"
