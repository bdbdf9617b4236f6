"""`mae-et plan`."""

from mae_et.cli.main import main


def test_plan_refuses_impossible_numbers(capsys) -> None:
    for images in ("0", "-5", "9" * 400):
        assert main(["plan", f"--images={images}"]) == 2
        assert "images must lie in (0, 1e15), got" in capsys.readouterr().err
