"""`mae-et plan`."""

import json

import pytest

from mae_et.cli.main import main


def test_plan_refuses_impossible_numbers(capsys) -> None:
    for images in ("0", "-5", "9" * 400):
        assert main(["plan", f"--images={images}"]) == 2
        assert "images must lie in (0, 1e15), got" in capsys.readouterr().err


def test_plan_compares_a_short_budget_with_its_own_images_and_a_long_one_with_mae(capsys) -> None:
    flags = ["--config=demo", "--images=1000", "--curriculum.cost=area"]
    assert main(["plan", *flags, "--curriculum.epochs=12", "--json"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert short["against_epochs"] == short["epochs"]
    assert short["speedup"] == pytest.approx(short["epochs"] / short["equivalent_epochs"])
    assert main(["plan", *flags, "--curriculum.epochs=200"]) == 0
    assert "8.00x less compute than 1600 epochs" in capsys.readouterr().out
