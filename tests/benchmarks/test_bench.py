"""Benchmarks run, and their arithmetic is correct; no test asserts a speed."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from device_decoding import opened, write_images
from mae_et.benchmarks import variants
from mae_et.benchmarks.command import BENCHMARKS
from mae_et.benchmarks.launches import launches
from mae_et.benchmarks.reference import PlainAutoencoder
from mae_et.benchmarks.rounds import Speed, interleave
from mae_et.benchmarks.step import _peak, operations
from mae_et.benchmarks.variants import variant

from mae_et import MaskedAutoencoder, UserError, mask_from_noise
from mae_et.cli.bench import bench
from mae_et.cli.main import main
from mae_et.config.data import DataConfig
from mae_et.data.device import decode_ahead, encoded
from mae_et.data.sampler import SampleIndex
from mae_et.training.efficiency import compile as compiling
from mae_et.training.efficiency.cuda_graphs import Capture


def test_no_rounds_and_no_images_are_refused() -> None:
    place = {"root": Path("r")}
    for name, settings in (
        ("step", {"batch": 0}), ("launches", {"batch": 0}), ("loader", place | {"rounds": 0}),
        ("run", place | {"epochs": 0.0}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{list(settings)[-1]} must be positive"):
            BENCHMARKS[name][0](**settings)


def test_rounds_exclude_the_warm_up_and_are_compared_pairwise() -> None:
    times: list[float] = [0]
    arms = {"a": lambda: times.append(times[-1] + 3), "b": lambda: times.append(times[-1] + 2)}
    speeds = interleave(arms, 3, clock=lambda: times[-1])
    assert times == [0, 3, 5, 8, 10, 13, 15, 18, 20]
    assert (speeds["a"].ratios, speeds["b"].ratios) == ((1.0,) * 3, (1.5,) * 3)


def test_ratio_prints_its_median_and_range() -> None:
    assert Speed((1.0, 1.0, 1.0), (3.0, 1.0, 2.0)).ratio() == "2.00 (1.00 to 3.00)"


def test_peak_memory_of_an_arm_is_read_after_cuda_is_initialised(monkeypatch) -> None:
    """Each arm has a new process, where torch.cuda has no peak to reset before."""
    calls: list[str] = []
    for name in ("init", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name) or 0)
    _peak(lambda: lambda: calls.append("step"), torch.device("cuda", 0))
    measured = ["max_memory_reserved", "reset_peak_memory_stats"]
    assert calls == ["init", *measured, "step", "step", *measured]


def test_plain_reference_computes_the_same_loss_as_the_model() -> None:
    """Otherwise a ratio of their speeds would be meaningless."""
    torch.manual_seed(0)
    plain = PlainAutoencoder("vit_tiny_patch16_224", 32, 32, 2, 2)
    ours = MaskedAutoencoder(
        "vit_tiny_patch16_224", 32, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2
    )
    weights = ours.encoder.state_dict()
    plain.encoder.load_state_dict(weights)
    decoder = ours.decoder.state_dict()
    assert not plain.load_state_dict(decoder, strict=False).unexpected_keys
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 4)
    expected = plain(images, noise, 1)
    torch.testing.assert_close(ours(images, mask_from_noise(noise, 0.75)).loss, expected)


@pytest.mark.parametrize("what", ["crop", pytest.param("step", marks=pytest.mark.slow)])
def test_bench_prints_json_on_its_last_line(what: str, last_json) -> None:
    flags = ["--encoder=vit_tiny_patch16_224", "--batch=1", "--rounds=1", "--memory=false",
             "--precisions=[fp32]"]  # fmt: skip
    assert main(["bench", what, *flags, "--device=cpu"]) == 0
    assert last_json()


@pytest.mark.slow
def test_bench_run_compares_whole_runs_round_by_round(
    photographs: Path, recipe: Path, last_json
) -> None:
    command = ["bench", "run", f"--root={photographs}", f"--recipe={recipe}", "--epochs=4"]
    assert main([*command, "--rounds=2", "--flags=[]"]) == 0
    figures = last_json()
    assert all(len(each) == 2 for each in figures["seconds"].values())
    assert len(figures["time_with_writing"]) == 3


def test_operations_include_attention_and_the_backward_pass() -> None:
    weight = torch.randn(16, 16, requires_grad=True)

    def step() -> None:
        hidden = (torch.randn(1, 8, 16) @ weight)[:, None]
        torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden).sum().backward()

    # x @ w and its gradient of w; two products of attention, and two gradients of each.
    assert operations(step) == 2 * 2 * 8 * 16 * 16 + 3 * 2 * 2 * 8 * 8 * 16


def test_launches_exclude_views_and_include_the_backward_pass() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    images = torch.ones(2, 4)
    # A product and a sum; then the sum's gradient, the product's, and adding it to the first.
    found = launches(lambda: (images @ weight.t()).view(-1).sum().backward())
    assert found == {"aten::mm": 2, "aten::sum": 1, "aten::ones_like": 1, "aten::add_": 1}


@pytest.mark.slow
def test_compiled_steps_launch_the_same_products_and_fewer_operators(last_json) -> None:
    flags = ["--encoder=vit_tiny_patch16_224", "--precisions=[bf16]", "--bandwidths=[96]"]
    assert main(["bench", "launches", *flags, "--device=cpu"]) == 0
    eager, compiled = last_json().values()
    products = [sum(found[f"aten::{name}"] for name in ("mm", "addmm", "bmm"))
                for found in (eager, compiled)]  # fmt: skip
    assert products[0] == products[1]
    assert sum(compiled.values()) < 0.6 * sum(eager.values())


def test_help_lists_every_bench(capsys) -> None:
    assert main(["bench", "--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert listed == ["node", *BENCHMARKS]
    assert all(f"{name}," in f"{bench.__doc__}".replace(".", ",") for name in listed[1:])


def test_unknown_bench_is_refused(capsys) -> None:
    assert main(["bench", "lunch"]) == 2
    assert f"bench needs one of {', '.join(['node', *BENCHMARKS])}" in capsys.readouterr().err


def test_variants_train_in_a_stream_that_is_also_that_of_graphs(monkeypatch) -> None:
    """Graphs run where they were captured."""
    used: list[str] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority=0: f"own {priority}")
    monkeypatch.setattr(compiling, "STEPS_WORTH_COMPILING", 1000)
    monkeypatch.setattr(Capture, "default_capture_stream", None)
    monkeypatch.setattr(decode_ahead, "PRIORITY", -1)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for name, queues, streams in (
        ("default", None, []), ("connections", "32", []), ("priority", "32", ["own -1"])
    ):  # fmt: skip
        with variant(name):
            assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues
            assert compiling.STEPS_WORTH_COMPILING == 0
        assert used == streams
        assert Capture.default_capture_stream == (streams[-1] if streams else None)


def test_a_part_of_the_images_is_decoded_by_the_cpu(tmp_path: Path, monkeypatch) -> None:
    """The same views as without the variant, in their places."""
    dataset = opened(DataConfig(root=write_images(tmp_path)))
    samples = encoded.EncodedDataset(dataset, dataset)
    indices = [SampleIndex(sample, 0, 0) for sample in range(8)]
    monkeypatch.setattr(encoded, "read_encoded", encoded.read_encoded)
    monkeypatch.setattr(variants, "CPU_PERCENT", 3)
    monkeypatch.setattr(compiling, "STEPS_WORTH_COMPILING", 1000)
    with variant("mixed"):
        mixed = [samples[index] for index in indices]
    kinds = [isinstance(sample, encoded.FinishedView) for sample in mixed]
    assert kinds == [index.sample < 3 for index in indices]
    assert torch.equal(mixed[1].image, dataset[indices[1]].images)
