"""docs/compared.md shows the figures that its command computes with other libraries."""

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from compared import ROWS

PAGE = (Path(__file__).parents[2] / "docs" / "compared.md").read_text(encoding="utf-8")
CELLS = {
    cells[-1].strip("`"): cells
    for line in PAGE.splitlines()
    if line.startswith("|")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def test_page_has_a_row_for_every_comparison() -> None:
    assert set(CELLS) - {"row", "---"} == {compare.__name__ for compare in ROWS}


@pytest.mark.parametrize("compare", ROWS, ids=lambda compare: compare.__name__)
def test_difference_is_within_tolerance_and_page_is_current(compare) -> None:
    row = compare()
    assert row.difference <= row.allowed
    what, other, ours, theirs, _, allowed, _ = CELLS[compare.__name__]
    assert (what, other) == (row.what, row.other)
    assert math.isclose(float(allowed), row.allowed, rel_tol=0.06)
    for shown, found in ((ours, row.ours), (theirs, row.theirs)):
        assert math.isclose(float(shown), found, rel_tol=1e-3) or abs(float(shown) - found) <= (
            row.allowed
        )


def test_weights_after_six_steps_equal_those_of_the_reference() -> None:
    from compared import GOLDEN, six_adamw_steps
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "mae_tiny_six_adamw_steps.safetensors")
    _, model = six_adamw_steps(golden["lr"].tolist())
    ours = dict(model.named_parameters())
    final = {name.removeprefix("final."): w for name, w in golden.items() if "final." in name}
    compared = 0
    for name, expected in final.items():
        part = "decoder." if "decoder" in name or name == "mask_token" else "encoder."
        found = ours.get(part + name.removeprefix("decoder_"))
        if found is not None:  # the decoder's fixed positions are not weights here
            # Softmax ignores the bias of the keys: AdamW scales up gradients that are rounding.
            tolerance = 1e-3 if name.endswith("qkv.bias") else 1e-4
            assert (found - expected).norm() <= tolerance * expected.norm(), name
            compared += 1
    assert compared == len(final) - 1
