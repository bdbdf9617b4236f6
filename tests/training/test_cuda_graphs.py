"""Passes that are replayed leave the losses and weights of eager ones.

A CPU has no graphs: here a fake one runs a pass again, in the memory of its capture.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from natural_images import jpeg, natural
from ranks import run_rank, start
from tiny_run import config_in
from torch import Tensor, nn

from mae_et import pretrain
from mae_et.checkpoints.store import newest_checkpoint
from mae_et.config.efficiency import EfficiencyConfig
from mae_et.data.batch import Batch
from mae_et.errors import RunFailed, UserError
from mae_et.io.metrics_file import read_metrics
from mae_et.training import build as building
from mae_et.training.efficiency import cuda_graphs
from mae_et.training.efficiency.cuda_graphs import GraphedPasses, should_replay
from mae_et.training.metrics import MetricsWindow

GPU = torch.device("cuda")
NUMBERS = ("loss", "grad_norm")


class FakeGraph:
    """Capture a pass as a CUDA graph does: its memory is fixed, and nothing has run."""

    def __init__(self, parameters: list[nn.Parameter], work: Any, batch: Any):
        self.parameters, self.work, self.batch = parameters, work, batch
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        self.adds = any(each is not None for each in before)
        self.loss = torch.full_like(work(batch), torch.nan)
        self.gradients = [p.grad for p in parameters]
        for gradient, value in zip(self.gradients, before, strict=True):
            if gradient is not None:
                gradient.copy_(torch.tensor(torch.nan) if value is None else value)

    def replay(self) -> None:
        """Run the pass again."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient if self.adds else None
        self.loss.copy_(self.work(self.batch))
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = None  # the caller has to set it


def replay_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Replay passes on the CPU; return a list of the captures, whether they add gradients."""
    captures: list[bool] = []
    passes: list[GraphedPasses] = []

    def record(work: Any, batch: Any, pool: Any) -> Any:
        graph = FakeGraph(passes[-1].parameters, work, batch)
        assert pool == ("shared" if graph.adds else None)
        captures.append(graph.adds)
        return cuda_graphs._Graph(graph.replay, graph.loss, "shared")

    def build(*given: Any, **named: Any) -> GraphedPasses:
        passes.append(GraphedPasses(*given, **named))
        return passes[-1]

    monkeypatch.setattr(building, "GraphedPasses", build)
    monkeypatch.setattr(building, "should_replay", lambda *_: True)
    monkeypatch.setattr(cuda_graphs, "record", record)
    for name in ("Stream", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    return captures


def outcome(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    saved = newest_checkpoint(folder / "checkpoints")
    assert saved is not None
    return [row["loss"] for row in read_metrics(folder)], saved["model"]


@pytest.mark.parametrize(
    ("micro_batch", "expected"),
    [(12, [False] * 4), (4, [False, False, False, True, False, True])],
)
def test_replayed_runs_equal_eager_ones_bit_for_bit(
    tmp_path: Path, monkeypatch, micro_batch: int, expected: list[bool]
) -> None:
    """A bandwidth has one graph, and a second that adds gradients if a step has several passes.

    The run is interrupted at the first of three bandwidths, and captures it anew.
    """
    flags = (f"--efficiency.micro_batch={micro_batch}", "--optim.clip_grad=1")
    losses, weights = outcome(pretrain(config_in(tmp_path, *flags)))
    captures = replay_on_cpu(monkeypatch)
    config = config_in(tmp_path, *flags, f"--output.dir={tmp_path / 'replayed'}")
    pretrain(config, stop_after_step=5)
    found, replayed = outcome(pretrain(config))
    assert found == losses
    assert all(torch.equal(replayed[name], weight) for name, weight in weights.items())
    assert captures == expected


def test_one_graph_serves_images_of_8_bits_and_arrays_of_floats(
    tmp_path: Path, monkeypatch
) -> None:
    """Micro-batches of one step may hold either, and those of one rank others than another's."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    for number in range(40):
        image = natural(36, 36, number)
        place = tmp_path / "images" / "train" / f"{number:02}"
        if number % 8:
            place.with_suffix(".jpg").write_bytes(jpeg(image))
        else:
            np.save(place.with_suffix(".npy"), np.asarray(image, np.float32) / 255)
    flags = (f"--data.root={tmp_path / 'images'}", "--efficiency.micro_batch=4")
    losses, weights = outcome(pretrain(config_in(tmp_path, *flags)))
    captures = replay_on_cpu(monkeypatch)
    run = pretrain(config_in(tmp_path, *flags, f"--output.dir={tmp_path / 'replayed'}"))
    found, replayed = outcome(run)
    assert found == losses
    assert all(torch.equal(replayed[name], weight) for name, weight in weights.items())
    assert captures == [False, False, True, False, True]


def rank_that_replays(*given: Any) -> None:
    """Run a rank whose passes are replayed."""
    replay_on_cpu(pytest.MonkeyPatch())
    run_rank(*given)


def rank_that_may_fail_to_capture(rank: int, *given: Any) -> None:
    """Run a rank whose passes are replayed, on the main rank only."""
    replay_on_cpu(patch := pytest.MonkeyPatch())
    if rank:
        patch.setattr(cuda_graphs, "record", failing("out of memory"))
    run_rank(rank, *given)


def rank_that_fails_to_capture(*given: Any) -> None:
    """Run a rank whose passes cannot be replayed."""
    replay_on_cpu(patch := pytest.MonkeyPatch())
    patch.setattr(cuda_graphs, "record", failing("out of memory"))
    run_rank(*given)


def test_ranks_average_gradients_as_distributed_data_parallel_does(tmp_path: Path) -> None:
    """Norms tell a mean from a sum, which AdamW divides by its own size."""
    found = []
    targets = None, rank_that_replays, rank_that_may_fail_to_capture, rank_that_fails_to_capture
    for number, target in enumerate(targets):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = start(folder, 2, "--efficiency.micro_batch=3", target=target).finish()
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("passes are not replayed") == (number > 1)
        assert f"out of memory (rank {'1' if number == 2 else '0, 1'})" in done.stderr or number < 2
        found.append([row[key] for row in read_metrics(folder / "2") for key in NUMBERS])
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-6)


def failing(error: str) -> Any:
    def record(*_: Any) -> None:
        raise RuntimeError(error)

    return record


def test_a_pass_that_cannot_be_captured_runs_eagerly_or_ends_the_run(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    """Also where it is the second of a step, whose gradients are added to those of the first."""
    flags = ("--efficiency.micro_batch=4", "--curriculum.epochs=1")
    losses, _ = outcome(pretrain(config_in(tmp_path, *flags)))
    replay_on_cpu(monkeypatch)
    captured, error = cuda_graphs.record, "operation not permitted when capturing"
    for fails in ("first", "second"):

        def record(work: Any, batch: Any, pool: Any, fails: str = fails) -> Any:
            if fails == ("second" if pool else "first"):
                if not pool:
                    work(batch)  # what it leaves as gradients has not run
                failing(error)()
            return captured(work, batch, pool)

        monkeypatch.setattr(cuda_graphs, "record", record)
        config = config_in(tmp_path, *flags, f"--output.dir={tmp_path / fails}")
        assert outcome(pretrain(config))[0] == losses
    said = "passes are not replayed (efficiency.cuda_graphs auto): operation not permitted"
    assert capfd.readouterr().err.count(said) == 2

    monkeypatch.setattr(cuda_graphs, "record", failing(error))
    weight = nn.Parameter(torch.ones(1))
    batch = Batch(torch.ones(1), torch.ones(1), torch.zeros(1))
    passes = GraphedPasses([weight], required=True)
    with pytest.raises(RunFailed, match="cuda_graphs true: the pass cannot be captured: operation"):
        passes(lambda each: each.images * weight, batch, 32, first=True)
    monkeypatch.setattr(cuda_graphs, "record", failing("CUDA out of memory. Tried to allocate"))
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        passes(lambda each: each.images * weight, batch, 32, first=True)
    assert GraphedPasses([weight])(lambda each: each.images * weight, batch, 32, first=True) == 1


@pytest.mark.parametrize("version", ["2.7", "2.11", "2.13"])
def test_a_failed_capture_raises_its_error_and_leaves_nothing_open(monkeypatch, version) -> None:
    """Neither its stream, nor the allocator's pool and the generator that PyTorch leaves open."""
    stream, library, generator = MagicMock(), MagicMock(), MagicMock()
    ends = failing("operation failed due to a previous error during capture")

    def initialise(graph: Any, _: Any, pool: Any, **__: Any) -> None:
        graph.stream_ctx, graph.pool = stream, (pool,)

    monkeypatch.setattr(torch.cuda.graph, "__init__", initialise)
    monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda _: None)
    monkeypatch.setattr(torch.cuda.graph, "__exit__", ends)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch, "_C", library)
    if version == "2.7":
        del library._cuda_endAllocateToPool
    if version == "2.13":
        library._cuda_endAllocateToPool.side_effect = RuntimeError("not currently recording")
    failures = ((failing("no copy from the CPU"), None, "no copy"), (len, "old", "previous error"))
    for work, pool, error in failures:
        with pytest.raises(RuntimeError, match=error):
            cuda_graphs.record(work, [], pool)
    assert stream.__exit__.call_count == generator.graphsafe_set_state.call_count == 2
    both = [((0, "new"),), ((0, "old"),)]
    last = "_cuda_endAllocateCurrentStreamToPool" if version == "2.7" else "_cuda_endAllocateToPool"
    assert getattr(library, last).call_args_list == both
    assert library._cuda_releasePool.call_args_list == ([] if version == "2.13" else both)


def test_memory_of_a_bandwidth_is_released_first_and_at_most_two_passes_are_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, batch = nn.Parameter(torch.ones(1)), Batch(torch.ones(1), torch.ones(1), torch.zeros(1))
    passes, done = GraphedPasses([weight]), []

    def record(*_: Any) -> Any:
        weight.grad = torch.ones(1)
        done.append("captured")
        return cuda_graphs._Graph(lambda: None, torch.ones(()), None)

    def release() -> None:
        assert not passes.graphs
        assert passes.batch is weight.grad is None
        done.append("returned")

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "empty_cache", release)
    events = [MagicMock() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "Event", MagicMock(side_effect=events))
    for name, waits in (("Stream", "stream waits"), ("current_stream", "training waits")):
        stream = SimpleNamespace(wait_stream=lambda _, waits=waits: done.append(waits))
        monkeypatch.setattr(torch.cuda, name, lambda _, stream=stream: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    for bandwidth in (16, 16, 32):
        passes(lambda _: done.append("warm"), batch, bandwidth, first=True)
    warm_up = ["stream waits", *["warm"] * cuda_graphs.WARM_UPS, "training waits"]
    assert done == ["returned", *warm_up, "captured"] * 2
    assert [event.synchronize.called for event in events] == [True, False, False]


def test_passes_are_replayed_where_each_does_the_same_work_on_a_gpu() -> None:
    assert should_replay(EfficiencyConfig(), GPU, static=True)
    assert not should_replay(EfficiencyConfig(), torch.device("cpu"), static=True)
    assert not should_replay(EfficiencyConfig(), GPU, static=False)
    assert not should_replay(EfficiencyConfig(cuda_graphs=False), GPU, static=True)
    excluding: list[dict[str, Any]] = [
        {"sharding": "full"}, {"sharding": "hybrid"}, {"gradient_checkpointing": True}
    ]  # fmt: skip
    for other in excluding:
        assert not should_replay(EfficiencyConfig(**other), GPU, static=True)
        with pytest.raises(UserError, match=f"cuda_graphs excludes efficiency.{next(iter(other))}"):
            EfficiencyConfig(cuda_graphs=True, **other)
    required = EfficiencyConfig(cuda_graphs=True)
    with pytest.raises(UserError, match="needs a GPU"):
        should_replay(required, torch.device("cpu"), static=True)
    with pytest.raises(UserError, match="only for pre-training"):
        should_replay(required, GPU, static=False)


def test_a_gpu_waits_for_data_while_it_is_idle(monkeypatch) -> None:
    """Between what was queued before the wait and what is queued after it, not while it works."""
    window = MetricsWindow(torch.device("cpu"))
    assert list(window.timed(iter([1, 2]))) == [1, 2]
    assert window._waited() == window.waited > 0
    window = MetricsWindow(torch.device("cpu"))
    # From one event to the next, 3 ms.
    event = SimpleNamespace(elapsed_time=lambda _: 3.0)
    monkeypatch.setattr(window, "_event", lambda: event)
    assert list(window.timed(iter([1, 2]))) == [1, 2]
    assert window._waited() == pytest.approx(2 * 0.003)
