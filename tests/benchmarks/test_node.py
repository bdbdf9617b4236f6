"""The benchmark of a node: what it measures, marks, sums up and submits."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mae_et.benchmarks import node, node_loading, node_training, training_step
from mae_et.benchmarks.node import passes_of, summary
from mae_et.benchmarks.node_exchange import all_reduce_speed
from mae_et.benchmarks.node_loading import GPU_DECODES, Way
from mae_et.benchmarks.node_tables import node_tables
from mae_et.benchmarks.node_training import SLACK, mark_noise, micro_batches, step_beside, timed

from mae_et.cli.main import main
from mae_et.config.files import load_config
from mae_et.config.schema import PretrainConfig
from mae_et.curriculum.gpu_speed import exchange_seconds, speed_of_step
from mae_et.curriculum.throughput import throughput_table
from mae_et.training.plan import make_plan


def test_a_step_that_does_not_end_is_given_up() -> None:
    """Whatever it makes of exceptions: a compiler reports all as failures of its own."""

    def step() -> None:
        try:
            time.sleep(60)
        except Exception as error:
            raise RuntimeError("the compiler failed") from error

    ends = time.monotonic() - SLACK + 0.05
    assert timed(lambda size: step, 4, 1.0, ends) == (4, None)


def test_figures_outlive_errors_of_libraries(monkeypatch, capfd) -> None:
    """Of a compiler, a decoder or the GPU; a way of loading has the error as its reason."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the library\nfailed")

    assert timed(lambda size: fail, 4, 1.0, time.monotonic()) == (4, None)
    assert "bench node: a step is not measured: the library failed" in capfd.readouterr().err
    config = load_config(PretrainConfig, [], ["--optim.batch_size=64"])
    way, plan = Way("files, fourier", config.data, "fourier", "cpu", []), make_plan(config, 10_000)
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext([way]))
    monkeypatch.setattr(node_loading, "_speed", fail)
    rows = node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 9)
    assert [row["reason"] for row in rows] == ["the library failed"] * 3


def _trained(bandwidth: int, size: int, seconds: float, compiled: bool = False) -> dict[str, Any]:
    row = {"bandwidth": bandwidth, "micro_batch": size, "seconds": seconds, "compiled": compiled}
    return row | {"images_per_second": size / seconds}


def test_speed_of_a_small_share_is_bound_by_launching_kernels() -> None:
    """36 ms whether a step has 256 or 512 images: 64 images take as long."""
    rows = [_trained(96, 256, 0.036), _trained(96, 512, 0.036), _trained(224, 64, 0.1)]
    measured = passes_of(rows, False)[96]
    assert speed_of_step(measured, 512) == speed_of_step(measured, 4096) == 512 / 0.036
    assert speed_of_step(measured, 64) == pytest.approx(64 / 0.036)
    assert speed_of_step({100: 1000, 200: 1000}, 10) == pytest.approx(1000)
    assert passes_of(rows, True) == {}


def test_training_is_timed_with_the_micro_batches_of_a_run() -> None:
    """501 images at 160 are rounded down to 256, which divide the 512 of a GPU."""
    sizes: dict[str, dict[int, int]] = {}
    for given in ("auto", "256", "{96: 64, 160: 32, 224: 16}"):
        flags = [f"--efficiency.micro_batch={given}", "--optim.batch_size=4096"]
        config = load_config(PretrainConfig, [], [*flags, "--curriculum.cost=area"])
        sizes[given] = micro_batches(config, make_plan(config, 10_000), 8)
    assert list(sizes.values()) == [
        {96: 512, 160: 512, 224: 512}, {96: 512, 160: 256, 224: 256}, {96: 64, 160: 32, 224: 16},
    ]  # fmt: skip


def test_plain_reference_is_timed_before_steps_that_compile(monkeypatch) -> None:
    """Compilation may take all of the time."""
    order: list[str] = []

    def timed(build: Any, size: int, *_: float) -> tuple[int, float]:
        compiled = build.func is node_training.step_of and build.args[0]
        order.append("compiled" if compiled else build.func.__name__)
        return size, 1.0

    monkeypatch.setattr(node_training, "timed", timed)
    monkeypatch.setattr(node_training, "_compiles", lambda _: True)
    monkeypatch.setattr(node_training, "network_of", lambda *given: given[2])
    config = load_config(PretrainConfig, [], ["--optim.batch_size=64"])
    plan = make_plan(config, 10_000)
    rows = node_training.training_speeds(config, plan, torch.device("cpu"), 1, 99)
    assert order == ["step_of"] * 6 + ["reference_step"] + ["compiled"] * 6
    assert [row.get("reference") for row in rows] == [None] * 12 + [True]


def test_small_micro_batch_slower_than_a_large_one_is_marked_and_not_used() -> None:
    """Otherwise its time would be taken to be all fixed, and hours to come from noise."""
    rows = [_trained(32, 64, 0.7), _trained(32, 8, 5.1), _trained(48, 64, 0.7),
            _trained(48, 8, 0.71), _trained(32, 8, 5.1, compiled=True)]  # fmt: skip
    rows.append(_trained(64, 64, 1.0) | {"seconds": None})
    mark_noise(rows)
    assert [row["noisy"] for row in rows] == [False, True, False, False, False, False]
    passes = passes_of(rows, False)
    assert speed_of_step(passes[32], 8) == pytest.approx(64 / 0.7)
    assert speed_of_step(passes[48], 8) == pytest.approx(8 / 0.7)  # launching kernels
    machine = {"gpus": 8, "device": "X", "cores": 2, "torch": "2", "loader_processes_per_gpu": 2}
    figures = {"machine": machine, "date": "today", "training": rows, "loading": [],
               "exchange": None,
               "checkpoint": {"bytes": 1, "seconds": 1.0, "pause_seconds": None,
                              "folder": "."}}  # fmt: skip
    assert node_tables(figures).count("noisy") == 1
    assert "training: one GPU, while the others are idle\nloading: from the page cache" in (
        node_tables(figures)
    )


def test_node_finds_the_fastest_flags_and_the_hours_that_plan_computes(
    tmp_path: Path, last_json, capsys
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
    machine = {"device": "X", "gpus": 1, "cores": 4, "torch": "2", "loader_processes_per_gpu": 4}
    figures: dict[str, Any] = {
        "machine": machine, "date": "today", "exchange": None, "training": training,
        "loading": [row | {"reason": "no time"} for row in loading],
        "checkpoint": {"bytes": 1, "seconds": 1.0, "pause_seconds": 0.1, "folder": "."},
    }  # fmt: skip
    figures |= summary(plan, figures, 1, 4)
    assert figures["fastest"]["flags"] == ["--efficiency.compile=true", GPU_DECODES]
    # Alone, the GPU trains 128, 43 and 21: at 96 it waits for what it decodes, not for cores.
    assert figures["images_per_second"] == {"96": 64.0, "160": 42.0, "224": 64 / 3}
    assert figures["loader_images_per_second"] is None
    found = [row["bottleneck"] for row in figures["throughput"]["loading"]]
    assert found == ["decoding", "gpu", "gpu"]
    trained = summary(plan, figures | {"loading": []}, 1, 4)["throughput"]
    assert figures["time_against_constant"] == trained["time_against_constant"]
    assert figures["time_against_constant"] < figures["throughput"]["time_against_constant"]
    assert figures["hours_by_way"]["files"] > figures["hours_by_way"]["GPU"]
    assert f"fastest: --efficiency.compile=true {GPU_DECODES}" in node_tables(figures)
    many = summary(plan, figures, 1, 24)["fastest"]["flags"]  # a run starts 16 by default
    assert many[2:] == ["--efficiency.num_workers=24"]

    said = (
        "exclude gradient exchange, checkpointing, start-up and storage slower than the page cache"
    )
    assert said in node_tables(figures)

    file = tmp_path / "node.json"
    file.write_text(json.dumps(figures))
    planned = ["plan", *flags, "--images=10000", f"--throughput={file}", "--gpus=1", "--json"]
    assert main(planned) == 0
    totals = last_json()["throughput"]["totals"]
    assert totals[0]["hours"] == pytest.approx(figures["hours_by_way"]["GPU"])
    exchange = {"ranks": 2, "bytes": 1, "seconds": 0.1, "bus_bytes_per_second": 1}
    by_files = summary(plan, figures | {"loading": loading[:1], "exchange": exchange}, 1, 4)
    file.write_text(json.dumps({"exchange": exchange} | by_files))
    assert main(planned) == 0
    model = last_json()["throughput"]
    assert model["totals"][0]["hours"] == by_files["hours_by_way"]["files"]
    assert model["given"]["exchange_included"]
    file.write_text(json.dumps({"passes": [1, 2]}))
    assert main(planned) == 2
    assert "has no images/s by bandwidth in 'passes'" in capsys.readouterr().err


def test_exchange_of_gradients_follows_the_passes_of_a_step(tmp_path: Path, last_json) -> None:
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
    # `plan` computes the same for any number of GPUs.
    (tmp_path / "node.json").write_text(json.dumps(figures))
    words = ["plan", *flags, "--images=10000", f"--throughput={tmp_path / 'node.json'}"]
    assert main([*words, "--gpus=1,2,4,8", "--json"]) == 0
    assert [row["hours"] for row in last_json()["throughput"]["totals"]] == hours
    assert exchange_seconds({"ranks": 2, "error": "no sum"}, 8) == exchange_seconds(None, 8) == 0


def test_node_saves_what_it_has_measured_so_far_and_prints_all(
    recipe: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    file, saved = tmp_path / "node.json", []

    def measured(config: PretrainConfig, images: int, seconds: float, write) -> dict:
        figures: dict = {"machine": {}}
        for part in ("training", "loading"):
            figures[part] = [images, seconds, config.model.image_size]
            write(figures)
            saved.append(json.loads(file.read_text()))
        return figures

    monkeypatch.setattr(node, "bench_node", measured)
    flags = ["--images=1000", "--seconds=9", f"--save={file}", "--json"]
    assert main(["bench", "node", f"--config={recipe}", *flags]) == 0
    assert list(saved[0]) == ["machine", "training"]
    assert json.loads(capsys.readouterr().out) == saved[1] == json.loads(file.read_text())
    assert saved[1]["loading"][:2] == [1000, 9]
    assert main(["bench", "node", f"--config={recipe}", *flags]) == 0
    file.write_text("seed: 1\n")
    assert main(["bench", "node", f"--config={recipe}", *flags]) == 2
    assert f"save {file} exists, and is not what this command writes" in capsys.readouterr().err
    assert main(["bench", "node", f"--config={recipe}", "--save=/proc/speeds/node.json"]) == 2
    assert "the folder /proc/speeds cannot be written to" in capsys.readouterr().err
    assert main(["bench", "node", f"--config={recipe}", "--output.dir=/proc/run"]) == 2
    assert "the folder /proc cannot be written to" in capsys.readouterr().err


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
def test_bench_node_measures_within_its_time(recipe: Path, tmp_path: Path, last_json) -> None:
    flags = ["--seconds=20", f"--save={tmp_path / 'node.json'}", "--images=1000", "--json",
             f"--output.dir={tmp_path}", "--efficiency.num_workers=0"]  # fmt: skip
    assert main(["bench", "node", f"--config={recipe}", *flags]) == 0
    figures = last_json()
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
    ways = [Way(name, data, "fourier", name, []) for name in ("cpu", "gpu")]
    clock = SimpleNamespace(perf_counter=read_clock, monotonic=read_clock)
    monkeypatch.setattr(node_loading, "time", clock)
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways))
    monkeypatch.setattr(node_loading, "choose_decoder", lambda *_: None)
    monkeypatch.setattr(node_loading, "_steps", lambda *_: beside)
    plan = make_plan(config, 10_000)
    rows = node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 120)
    assert all(row["images_per_second"] for row in rows)
    assert {bandwidth for bandwidth, _ in steps} == set(plan.bandwidths)
    assert {size for _, size in steps} == {8}
    steps.clear()
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways[:1]))
    node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 20)
    assert not steps

    def slow_at_first(bandwidth: int, size: int) -> Callable[[], object]:
        taken = iter([100.0])

        def step() -> None:
            nonlocal now
            now += next(taken, 20.0)

        return step

    tick = 0
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways[1:]))
    monkeypatch.setattr(node_loading, "_steps", lambda *_: slow_at_first)
    rows = node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 600)
    assert [row["images_per_second"] for row in rows] == [8 / 20] * 3

    def slow_start() -> Iterator[None]:
        nonlocal now
        now += 1000
        yield from repeat(None)

    monkeypatch.setattr(
        node_loading, "training_batches", lambda *_, **__: nullcontext(slow_start())
    )
    rows = node_loading.loading_speeds(config, plan, torch.device("cpu"), 2, 600)
    assert [row.get("reason") for row in rows] == ["no time"] * 3  # only prefetched batches


def test_slow_loading_is_measured_in_the_time_of_a_way(monkeypatch) -> None:
    """By 16 processes that start in half a second and load 2,470 images a second together."""
    now, processes, speed = 0.0, 16, 2470

    def loaded(dataset: Any, sampler: Any, *_: Any, **__: Any) -> Any:
        (size,) = sampler.micro_batch.values()

        def batches() -> Iterator[None]:
            nonlocal now
            for number in count():
                rounds = number // processes + 1  # each process makes a batch in every round
                now = max(now, 0.5 + rounds * processes * size / speed)
                yield

        return nullcontext(batches())

    config = load_config(PretrainConfig, [], [])
    data = replace(config.data, name="synthetic", synthetic_size=32, synthetic_train=250)
    way = Way("files, fourier", data, "fourier", "cpu", [])
    monkeypatch.setattr(node_loading, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(node_loading, "training_batches", loaded)
    monkeypatch.setattr(node_loading, "choose_decoder", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    gpu, plan = torch.device("cuda"), make_plan(config, 10_000)
    found = node_loading._speed(gpu, None, config, way, plan, 224, processes, 2.0)
    assert found == pytest.approx(speed, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("died", [False, True])
def test_loading_is_timed_on_all_gpus_at_once(monkeypatch, died: bool) -> None:
    config = load_config(PretrainConfig, [], ["--optim.batch_size=64", "--efficiency.device=cpu"])
    data = replace(config.data, synthetic_size=32, synthetic_train=8)
    ways = [Way("cpu", data, "fourier", "cpu", [], by_bandwidth=False)]
    monkeypatch.setattr(node_loading, "_ways", lambda _: nullcontext(ways))
    if died:
        monkeypatch.setattr(node_loading, "_start", sys.exit)
    plan = make_plan(config, 10_000)
    (row,) = node_loading.loading_speeds(config, plan, torch.device("cpu"), 0, 4, gpus=2)
    assert (row["images_per_second"] is None) == died
    assert row.get("reason", "").startswith("a process of one of the GPUs died") == died
