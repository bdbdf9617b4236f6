"""docs/compared.md shows the figures that its command computes with other libraries."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from tiny_run import GOLDEN

PAGE = (Path(__file__).parents[2] / "docs" / "compared.md").read_text(encoding="utf-8")
CELLS = {
    cells[-1].strip("`"): cells
    for line in PAGE.splitlines()
    if line.startswith("|")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


NAMES = sorted(CELLS.keys() - {"row", "---"})


@pytest.fixture(scope="module")
def compared() -> ModuleType:
    """The comparisons, with the libraries that they need."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    return importlib.import_module("compared")


def test_page_has_a_row_for_every_comparison(compared: ModuleType) -> None:
    assert sorted(compare.__name__ for compare in compared.ROWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_difference_is_within_tolerance_and_page_is_current(
    compared: ModuleType, name: str
) -> None:
    row = getattr(compared, name)()
    assert row.difference <= row.allowed
    what, other, ours, theirs, _, allowed, _ = CELLS[name]
    assert (what, other) == (row.what, row.other)
    assert math.isclose(float(allowed), row.allowed, rel_tol=0.06)
    for shown, found in ((ours, row.ours), (theirs, row.theirs)):
        assert math.isclose(float(shown), found, rel_tol=1e-3) or abs(float(shown) - found) <= (
            row.allowed
        )


def test_weights_after_six_steps_equal_those_of_the_reference(compared: ModuleType) -> None:
    golden = load_file(GOLDEN / "mae_tiny_six_adamw_steps.safetensors")
    _, model = compared.six_adamw_steps(golden["lr"].tolist())
    ours = dict(model.named_parameters())
    final = {name.removeprefix("final."): w for name, w in golden.items() if "final." in name}
    count = 0
    for name, expected in final.items():
        part = "decoder." if "decoder" in name or name == "mask_token" else "encoder."
        found = ours.get(part + name.removeprefix("decoder_"))
        if found is not None:  # the decoder's fixed positions are not weights here
            # Softmax ignores the bias of the keys: AdamW scales up gradients that are rounding.
            tolerance = 1e-3 if name.endswith("qkv.bias") else 1e-4
            assert (found - expected).norm() <= tolerance * expected.norm(), name
            count += 1
    assert count == len(final) - 1
