"""Benchmarks run, and their arithmetic is correct; no test asserts a speed."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mae_et.benchmarks import node, node_loading, training_step, variants
from mae_et.benchmarks.command import BENCHMARKS
from mae_et.benchmarks.launches import launches
from mae_et.benchmarks.node import summary, trained_speed
from mae_et.benchmarks.node_exchange import all_reduce_speed, exchange_seconds
from mae_et.benchmarks.node_loading import GPU_DECODES
from mae_et.benchmarks.node_tables import node_tables
from mae_et.benchmarks.node_training import SLACK, mark_noise, step_beside, timed
from mae_et.benchmarks.quality import QualityConfig, arm_config
from mae_et.benchmarks.quality_table import SCORES, draw, equal_accuracy, table
from mae_et.benchmarks.reference import PlainAutoencoder
from mae_et.benchmarks.rounds import Speed, interleave
from mae_et.benchmarks.step import _peak, operations
from mae_et.benchmarks.variants import FREE_PROCESSORS, variant
from PIL import Image

from mae_et import MaskedAutoencoder, UserError
from mae_et.cli.bench import bench
from mae_et.cli.main import main
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.throughput import throughput_table
from mae_et.data import device_decode
from mae_et.training.cuda_graphs import Capture
from mae_et.training.plan import make_plan


def test_no_rounds_and_no_images_are_refused() -> None:
    place = {"root": Path("r")}
    for name, settings in (
        ("step", {"batch": 0}), ("launches", {"batch": 0}), ("loader", place | {"rounds": 0}),
        ("run", place | {"epochs": 0.0}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{list(settings)[-1]} must be positive"):
            BENCHMARKS[name][0](**settings)


def test_rounds_exclude_the_warm_up_and_are_compared_pairwise() -> None:
    calls: list[str] = []
    speeds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert {len(speed.seconds) for speed in speeds.values()} == {3}
    assert speeds["a"].ratios == (1.0, 1.0, 1.0)


def test_faster_arm_has_a_higher_speed_ratio() -> None:
    times: list[float] = [0]
    arms = {"a": lambda: times.append(times[-1] + 3), "b": lambda: times.append(times[-1] + 2)}
    assert interleave(arms, 2, clock=lambda: times[-1])["b"].ratios == (1.5, 1.5)


def test_a_step_that_does_not_end_is_given_up() -> None:
    """Whatever it makes of exceptions: a compiler reports all as failures of its own."""

    def step() -> None:
        try:
            time.sleep(60)
        except Exception as error:
            raise RuntimeError("the compiler failed") from error

    ends = time.monotonic() - SLACK + 0.05
    assert timed(lambda size: step, 4, 1.0, ends) == (4, None)


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
    torch.testing.assert_close(ours(images, 0.75, noise, every_patch=False).loss, expected)


@pytest.mark.parametrize("what", ["crop", pytest.param("step", marks=pytest.mark.slow)])
def test_bench_prints_json_on_its_last_line(what: str, capsys) -> None:
    flags = ["--encoder=vit_tiny_patch16_224", "--batch=1", "--rounds=1", "--memory=false",
             "--precisions=[fp32]"]  # fmt: skip
    assert main(["bench", what, *flags, "--device=cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder of two classes of noise, for training and for validation."""
    draw = random.Random(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("dark", "light"):
            folder = tmp_path / "photographs" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = bytes(draw.randrange(128) + 127 * (name == "light") for _ in range(3072))
                Image.frombytes("RGB", (32, 32), noise).save(folder / f"{number}.png")
    return tmp_path / "photographs"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return the path of the config of a small model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {encoder: vit_tiny_patch16_224, image_size: 64, encoder_embed_dim: 32, "
        "encoder_depth: 2, encoder_num_heads: 2, decoder_embed_dim: 16, decoder_depth: 1, "
        "decoder_num_heads: 2}\n"
        "data: {eval_crop: 1.0}\n"
        "optim: {batch_size: 8}\n"
        "efficiency: {num_workers: 0, device: cpu, precision: fp32}\n"
    )
    return path


def test_equal_images_arm_trains_on_as_many_images_as_plain(
    photographs: Path, recipe: Path, tmp_path: Path
) -> None:
    config = QualityConfig(photographs, recipe=str(recipe), epochs=40)
    plain, etpp = (
        arm_config(config, name, 0, tmp_path / name) for name in ("plain", "etpp-equal-images")
    )
    assert make_plan(etpp, 32).images == pytest.approx(make_plan(plain, 32).images, rel=0.02)
    assert etpp.curriculum.epochs < 30


@pytest.mark.slow
def test_quality_matches_images_or_time_and_reuses_finished_arms(
    photographs: Path, recipe: Path, tmp_path: Path, capsys
) -> None:
    arms = [
        "untrained",
        "plain",
        "etpp-replay",
        "etpp-equal-images",
        "decoder-full",
        "decoder-cross-equal-time",
    ]
    command = [
        "bench", "quality", f"--root={photographs}", f"--recipe={recipe}",
        f"--folder={tmp_path / 'quality'}", f"--arms=[{','.join(arms)}]", "--epochs=4",
        "--fine_tune_epochs=1",
    ]  # fmt: skip
    assert main(command) == 0
    rows = {name: each[0] for name, each in _last_line(capsys).items()}
    assert set(rows) == set(arms)
    assert rows["etpp-equal-images"]["images"] == pytest.approx(rows["plain"]["images"], abs=8)
    assert rows["etpp-equal-images"]["equivalent_epochs"] < rows["plain"]["equivalent_epochs"]
    # Half the depth on a third of the hidden patches is much faster, so it trains on more images.
    assert rows["decoder-cross-equal-time"]["images"] > rows["decoder-full"]["images"]
    assert all(0 <= row[score] <= 100 for row in rows.values() for score in SCORES)

    encoders = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert main(command) == 0
    assert {name: each[0] for name, each in _last_line(capsys).items()} == rows
    assert {path: path.stat().st_mtime_ns for path in encoders} == encoders


@pytest.mark.slow
def test_bench_run_compares_whole_runs_round_by_round(
    photographs: Path, recipe: Path, capsys
) -> None:
    command = ["bench", "run", f"--root={photographs}", f"--recipe={recipe}", "--epochs=4"]
    assert main([*command, "--rounds=2", "--flags=[]"]) == 0
    figures = _last_line(capsys)
    assert all(len(each) == 2 for each in figures["seconds"].values())
    assert len(figures["time_with_writing"]) == 3


def test_unknown_quality_arm_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["bench", "quality", f"--root={tmp_path}", "--arms=[plainer]"]) == 2
    assert "arms must be some of untrained, plain, plain-2x" in capsys.readouterr().err


def test_replay_arm_replays_the_smaller_bandwidths(photographs: Path, recipe: Path) -> None:
    config = QualityConfig(photographs, recipe=str(recipe), epochs=40)
    arm = arm_config(config, "etpp-replay", 0, Path("none"))
    shown = sorted({stage.bandwidth for stage in make_plan(arm, 32).stages})
    assert arm.data.replay == dict(zip(shown[:-1], (4, 2), strict=False))


def _figures(epochs: float, seconds: float, *scores: float) -> dict[str, Any]:
    costs = {"images": 64, "equivalent_epochs": epochs, "seconds": seconds}
    return costs | dict(zip(SCORES, scores, strict=True))


def test_equal_accuracy_interpolates_the_curve_of_plain_mae(tmp_path: Path) -> None:
    """Half the way from 2x to 4x is 2.83x on a logarithmic axis; beyond the curve only a bound."""
    rows = {
        "untrained": [_figures(0, 0, 25, 25, 25)],
        "plain": [_figures(4, 100, 29, 40, 50), _figures(4, 100, 31, 40, 50)],
        "plain-hog": [_figures(4, 150, 26, 63, 45)],
        "plain-hog-4x": [_figures(16, 600, 46, 67, 53)],
        "plain-2x": [_figures(8, 200, 34, 50, 60)],
        "plain-4x": [_figures(16, 400, 38, 60, 70)],
        "etpp-hog": [_figures(4, 200, 36, 65, 49)],
    }
    assert "| etpp-hog | 2.83x (1.41x) | > 4.00x (> 2.00x) | < 1.00x (< 0.50x) |" in (
        equal_accuracy(rows)
    )
    of_pixels, of_hog = equal_accuracy(rows).split("plain MAE with HOG")
    assert "| plain-hog | < 1.00x" in of_pixels
    # Half the way from 1x to 4x is 2x, of the same target.
    assert "| etpp-hog | 2.00x (1.50x) | 2.00x (1.50x) | 2.00x (1.50x) |" in of_hog
    assert of_hog.count("| plain") == 0
    assert "| plain | 2 | 64 | 4.00 | 100 s (1.00x) | 30.0 ± 1.4 | 40.0 ± 0.0 | 50.0 ± 0.0 |" in (
        table(rows)
    )
    busy = [_figures(4, seconds, 30, 40, 50) for seconds in (100, 101, 900)]
    assert "| 101 s (1.00x) |" in table({"plain": busy})
    assert equal_accuracy({"plain": rows["plain"], "etpp-hog": rows["etpp-hog"]}) == ""
    pytest.importorskip("matplotlib")
    draw(tmp_path / "quality.png", rows)
    with Image.open(tmp_path / "quality.png") as image:
        assert image.size == (1980, 960)


def _last_line(capsys) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


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
def test_compiled_steps_launch_the_same_products_and_fewer_operators(capsys) -> None:
    flags = ["--encoder=vit_tiny_patch16_224", "--precisions=[bf16]", "--bandwidths=[96]"]
    assert main(["bench", "launches", *flags, "--device=cpu"]) == 0
    eager, compiled = _last_line(capsys).values()
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
    assert "bench needs one of node, step" in capsys.readouterr().err


def _trained(bandwidth: int, size: int, seconds: float, compiled: bool = False) -> dict[str, Any]:
    row = {"bandwidth": bandwidth, "micro_batch": size, "seconds": seconds, "compiled": compiled}
    return row | {"images_per_second": size / seconds}


def test_speed_of_a_small_share_is_bound_by_launching_kernels() -> None:
    """36 ms whether a step has 256 or 512 images: 64 images take as long."""
    rows = [_trained(96, 256, 0.036), _trained(96, 512, 0.036), _trained(224, 64, 0.1)]
    assert trained_speed(rows, 96, False, 512) == pytest.approx(512 / 0.036)
    assert trained_speed(rows, 96, False, 64) == pytest.approx(64 / 0.036)
    proportional = [_trained(96, 100, 0.1), _trained(96, 200, 0.2)]
    assert trained_speed(proportional, 96, False, 10) == pytest.approx(1000)
    assert trained_speed(rows, 96, True, 64) is None


def test_small_micro_batch_slower_than_a_large_one_is_marked_and_not_used() -> None:
    """Otherwise its time would be taken to be all fixed, and hours to come from noise."""
    rows = [_trained(32, 64, 0.7), _trained(32, 8, 5.1), _trained(48, 64, 0.7),
            _trained(48, 8, 0.71), _trained(32, 8, 5.1, compiled=True)]  # fmt: skip
    rows.append(_trained(64, 64, 1.0) | {"seconds": None})
    mark_noise(rows)
    assert [row["noisy"] for row in rows] == [False, True, False, False, False, False]
    assert trained_speed(rows, 32, False, 8) == pytest.approx(64 / 0.7)
    assert trained_speed(rows, 48, False, 8) == pytest.approx(8 / 0.7)  # launching kernels
    figures = {"machine": {"gpus": 0, "device": "X", "cores": 2, "torch": "2"}, "date": "today",
               "training": rows, "loading": [], "exchange": None,
               "checkpoint": {"bytes": 1, "seconds": 1.0, "folder": "."}}  # fmt: skip
    assert node_tables(figures).count("noisy") == 1


def test_node_finds_the_fastest_flags_and_the_hours_that_plan_computes(
    tmp_path: Path, capsys
) -> None:
    flags = ["--optim.batch_size=64", "--curriculum.epochs=40", "--curriculum.cost=area"]
    config = load_config(PretrainConfig, [], flags)
    plan = make_plan(config, 10_000)
    training = [
        _trained(b, 64, seconds / speed, compiled)
        for b, seconds in ((96, 1), (160, 3), (224, 6))
        for compiled, speed in ((False, 1), (True, 2))
    ]
    loading = [
        {"way": "files", "bandwidth": None, "images_per_second": 10.0, "flags": []},
        *({"way": "GPU", "bandwidth": b, "images_per_second": s, "flags": [GPU_DECODES]}
          for b, s in ((96, 64.0), (160, 42.0), (224, 900.0))),
        {"way": "shards", "bandwidth": 96, "images_per_second": None, "flags": ["--shards"]},
    ]  # fmt: skip
    machine = {"device": "X", "gpus": 1, "cores": 4, "torch": "2"}
    figures: dict[str, Any] = {
        "machine": machine, "date": "today", "exchange": None, "training": training,
        "loading": [row | {"reason": "no time"} for row in loading],
        "checkpoint": {"bytes": 1, "seconds": 1.0, "folder": "."},
    }  # fmt: skip
    figures |= summary(plan, figures, 1, 4)
    assert figures["fastest"]["flags"] == ["--efficiency.compile=true", GPU_DECODES]
    # Alone, the GPU trains 128, 43 and 21: at 96 it waits for what it decodes, not for cores.
    assert figures["images_per_second"] == {"96": 64.0, "160": 42.0, "224": 64 / 3}
    assert figures["loader_images_per_second"] is None
    found = [row["bottleneck"] for row in figures["throughput"]["loading"]]
    assert found == ["decoding", "gpu", "gpu"]
    assert figures["hours_by_way"]["files"] > figures["hours_by_way"]["GPU"]
    assert f"fastest: --efficiency.compile=true {GPU_DECODES}" in node_tables(figures)

    assert "exclude gradient exchange, checkpointing" in node_tables(figures)

    file = tmp_path / "node.json"
    file.write_text(json.dumps(figures))
    planned = ["plan", *flags, "--images=10000", f"--throughput={file}", "--gpus=1", "--json"]
    assert main(planned) == 0
    totals = _last_line(capsys)["throughput"]["totals"]
    assert totals[0]["hours"] == pytest.approx(figures["hours_by_way"]["GPU"])
    file.write_text(json.dumps({"images_per_second": [1, 2]}))
    assert main(planned) == 2
    assert "has no images/s by bandwidth in 'images_per_second'" in capsys.readouterr().err


def test_exchange_of_gradients_follows_the_passes_of_a_step() -> None:
    """On two GPUs, 32 images each: at 96 it takes as long as they do, 0.1 s."""
    flags = ["--optim.batch_size=64", "--curriculum.epochs=40", "--curriculum.cost=area"]
    plan = make_plan(load_config(PretrainConfig, [], flags), 10_000)
    training = [_trained(b, 32, seconds) for b, seconds in ((96, 0.1), (160, 0.3), (224, 0.6))]
    found = {"ranks": 2, "bytes": 10**9, "seconds": 0.1, "bus_bytes_per_second": 10**10}
    figures: dict[str, Any] = {"training": training, "loading": [], "exchange": found}
    figures |= summary(plan, figures, 2, 4)
    speeds = figures["images_per_second"]
    assert speeds == pytest.approx({"96": 32 / 0.2, "160": 32 / 0.4, "224": 32 / 0.7})
    model = figures["throughput"]
    assert [row.get("bottleneck") for row in model["loading"]] == ["exchange", None, None]
    assert "exclude checkpointing" in throughput_table(model)
    # On one GPU there is none; on eight, 8 images each, it takes 7/4 of the time on two.
    assert exchange_seconds(found, 1) == 0
    assert exchange_seconds(found, 8) == pytest.approx(0.175)
    hours = [row["hours"] for row in model["totals"]]
    assert hours[2] < hours[0]
    assert exchange_seconds({"ranks": 2, "error": "no sum"}, 8) == exchange_seconds(None, 8) == 0


def test_node_saves_what_it_has_measured_so_far_and_prints_all(
    recipe: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    file, saved = tmp_path / "node.json", []

    def measured(config: PretrainConfig, images: int, seconds: float, write) -> dict:
        figures: dict = {}
        for part in ("training", "loading"):
            figures[part] = [images, seconds, config.model.image_size]
            write(figures)
            saved.append(json.loads(file.read_text()))
        return figures

    monkeypatch.setattr(node, "bench_node", measured)
    flags = ["--images=1000", "--seconds=9", f"--save={file}", "--json"]
    assert main(["bench", "node", f"--config={recipe}", *flags]) == 0
    assert list(saved[0]) == ["training"]
    assert json.loads(capsys.readouterr().out) == saved[1] == json.loads(file.read_text())
    assert saved[1]["loading"][:2] == [1000, 9]


def test_node_is_submitted_as_one_task_with_all_gpus(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["submit", "bench", "node", "--output.dir=run", "--cluster=node_8gpu", "--dry-run"]
    assert main(command) == 0
    out = capsys.readouterr().out
    for line in ("--nodes=1", "--gpus-per-node=8", "--ntasks-per-node=1", "--cpus-per-task=96"):
        assert f"#SBATCH {line}\n" in out
    assert "# mae-et bench node --output.dir=run --save=run/node.json" in out
    assert main(["submit", "bench", "step", "--dry-run"]) == 2
    assert "only the benchmark node can be submitted" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_node_measures_within_its_time(recipe: Path, tmp_path: Path, capsys) -> None:
    flags = ["--seconds=20", f"--save={tmp_path / 'node.json'}", "--images=1000", "--json",
             f"--output.dir={tmp_path}", "--efficiency.num_workers=0"]  # fmt: skip
    assert main(["bench", "node", f"--config={recipe}", *flags]) == 0
    figures = _last_line(capsys)
    assert figures == json.loads((tmp_path / "node.json").read_text())
    assert {row["bandwidth"] for row in figures["training"] if row["seconds"]} == {32, 48, 64}


@pytest.mark.slow
def test_exchange_is_timed_over_processes() -> None:
    found = all_reduce_speed("cpu", 2, 1000)
    assert found["bytes"] == 4000
    assert found["bus_bytes_per_second"] == pytest.approx(4000 / found["seconds"])


def test_a_step_waits_for_the_gpu_only_to_be_timed(recipe: Path, monkeypatch) -> None:
    """Beside loading it would wait for what is decoded, too."""
    config, cpu = load_config(PretrainConfig, [recipe]), torch.device("cpu")
    waits: list[torch.device] = []
    monkeypatch.setattr(training_step, "wait", waits.append)
    step_beside(config, cpu)(32, 2)()
    assert waits == []
    training_step.training_step(config.model, 2, 32, "fp32", cpu)()
    assert waits == [cpu]


def test_variants_change_one_thing_of_training(monkeypatch) -> None:
    """Its stream is also that of graphs, which run where they were captured."""
    made: dict[str, int] = {}
    used: list[str] = []
    green = SimpleNamespace(Stream=lambda: "green")
    create = SimpleNamespace(create=lambda **sizes: made.update(sizes) or green)
    contexts = SimpleNamespace(GreenContext=create)  # PyTorch 2.7 has none
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setitem(sys.modules, "torch.cuda.green_contexts", contexts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority=0: f"own {priority}")
    sharing: set[str] = set()

    def changed(name: str) -> tuple[list[str], object, str, int, set[str]]:
        used.clear()
        sharing.clear()
        monkeypatch.setattr(variants, "SHARING", sharing)
        monkeypatch.setattr(Capture, "default_capture_stream", None)
        monkeypatch.setattr(device_decode, "PRIORITY", -1)
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        with variant(name):
            queues = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
        return [*used], Capture.default_capture_stream, queues, device_decode.PRIORITY, {*sharing}

    assert changed("default") == ([], None, "32", -1, set())
    assert changed("connections") == ([], None, "8", -1, set())
    assert changed("priority") == (["own -1"], "own -1", "32", -2, set())
    assert changed("own") == (["own 0"], "own 0", "32", -1, set())
    assert changed("partition") == (["green"], "green", "32", -1, set())
    assert changed("shared") == ([], None, "32", -1, {"cuda"})
    assert made == {"num_sms": 132 - FREE_PROCESSORS, "device_id": 0}


def test_images_that_the_gpu_decodes_are_timed_beside_training(monkeypatch) -> None:
    """Training and decoding share the GPU: alone, each would be faster. First steps are slow."""
    config = load_config(PretrainConfig, [], ["--optim.batch_size=64", "--efficiency.device=cpu"])
    steps: list[tuple[int, int]] = []
    now, tick = 0.0, 1.0

    def read_clock() -> float:
        nonlocal now
        now += tick
        return now

    def beside(bandwidth: int, size: int) -> Callable[[], object]:
        return lambda: steps.append((bandwidth, size))

    data = replace(config.data, synthetic_size=32, synthetic_train=8)
    ways = [node_loading.Way(name, data, "fourier", name, []) for name in ("cpu", "gpu")]
    clock = SimpleNamespace(perf_counter=read_clock, monotonic=read_clock)
    monkeypatch.setattr(node_loading, "time", clock)
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways))
    monkeypatch.setattr(node_loading, "choose_decoder", lambda *_: None)
    plan = make_plan(config, 10_000)
    rows = node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 120, beside)
    assert all(row["images_per_second"] for row in rows)
    assert {bandwidth for bandwidth, _ in steps} == set(plan.bandwidths)
    assert {size for _, size in steps} == {8}
    steps.clear()
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways[:1]))
    node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 20, beside)
    assert not steps

    def slow_at_first(bandwidth: int, size: int) -> Callable[[], object]:
        taken = iter([100.0])

        def step() -> None:
            nonlocal now
            now += next(taken, 20.0)

        return step

    tick = 0
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways[1:]))
    rows = node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 600, slow_at_first)
    assert [row["images_per_second"] for row in rows] == [8 / 20] * 3
