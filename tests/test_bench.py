"""Benchmarks run, and their arithmetic is right; how fast anything is, they say, not tests."""

import json
import time

import pytest
import torch

from mae_et import MaskedAutoencoder
from mae_et.benchmarks.reference import PlainAutoencoder
from mae_et.benchmarks.rounds import Speed, interleave
from mae_et.cli import main


def test_rounds_are_counted_after_the_warm_up_and_compared_within_a_round() -> None:
    calls: list[str] = []
    speeds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert {len(speed.seconds) for speed in speeds.values()} == {3}
    assert speeds["a"].ratios == (1.0, 1.0, 1.0)


def test_an_arm_that_sleeps_half_as_long_is_about_twice_as_fast() -> None:
    speeds = interleave({"a": lambda: time.sleep(0.1), "b": lambda: time.sleep(0.05)}, 1, 0)
    assert speeds["b"].ratios[0] > 1.2


def test_a_ratio_reads_as_its_median_and_its_range() -> None:
    assert Speed((1.0, 1.0, 1.0), (3.0, 1.0, 2.0)).ratio(".1f") == "2.0 (1.0 to 3.0)"


def test_the_plain_reference_has_the_loss_of_the_model() -> None:
    """Else a ratio of their speeds would say nothing."""
    torch.manual_seed(0)
    plain = PlainAutoencoder("vit_tiny_patch16_224", 32, 32, 2, 2)
    ours = MaskedAutoencoder(
        "vit_tiny_patch16_224", 32, decoder_width=32, decoder_depth=2, decoder_heads=2
    )
    weights = ours.encoder.state_dict()
    plain.encoder.load_state_dict(weights)
    decoder = ours.decoder.state_dict()
    assert not plain.load_state_dict(decoder, strict=False).unexpected_keys
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 4)
    expected = plain(images, noise, 1)
    torch.testing.assert_close(ours(images, 0.75, noise, every_patch=False).loss, expected)


@pytest.mark.parametrize("what", ["crop", pytest.param("step", marks=pytest.mark.slow)])
def test_bench_ends_in_one_line_of_figures(what: str, capsys) -> None:
    flags = ["--encoder=vit_tiny_patch16_224", "--batch=1", "--rounds=1", "--memory=false"]
    assert main(["bench", what, *flags, "--device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


def test_bench_of_nothing_is_refused(capsys) -> None:
    assert main(["bench", "lunch"]) == 2
    assert "bench needs one of step" in capsys.readouterr().err
