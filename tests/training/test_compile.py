"""Compilation: blocks share their graphs, and the numbers stay those of eager mode."""

from types import SimpleNamespace

import pytest
import torch
from ranks import aot_eager_rank, start
from small_mae import small
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_et import Curriculum, Stage, mask_from_noise
from mae_et.io.metrics_file import read_metrics
from mae_et.runtime.distributed import DistributedContext
from mae_et.training.efficiency import compile as compiling
from mae_et.training.efficiency.compile import compile_network, report_compilation, should_compile
from mae_et.training.efficiency.fsdp import shard
from mae_et.training.periodic import do_work

SHORT = Curriculum((Stage(16, 1), Stage(32, 1)), 32, 16).plan(6, 40, 12)
LONG = Curriculum((Stage(16, 1), Stage(32, 1)), 32, 16).plan(2000, 40, 12)
ON_A_GPU = DistributedContext(0, 1, torch.device("cuda", 7))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


@pytest.fixture
def counter():
    """A compiler that counts graphs and runs them eagerly."""
    from torch._dynamo.testing import CompileCounter

    return CompileCounter()


def losses(model: nn.Module, sides: tuple[int, ...], device: str = "cpu") -> list[torch.Tensor]:
    """Return the losses of 6 images at each side, a number that differs from those of tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for side in sides:
        images = torch.randn(6, 3, side, side, generator=generator).to(device)
        noise = torch.rand(6, (side // 8) ** 2, generator=generator).to(device)
        found.append(model(images, mask_from_noise(noise, 0.75)).loss)
    return found


@pytest.mark.parametrize(("device", "graphs"), [("cpu", 3), ("meta", 3 * 2)])
def test_blocks_of_a_kind_share_their_graphs(counter, device: str, graphs: int) -> None:
    """Of the encoder, of the decoder, and of the decoder's last block, which computes less.

    `meta` stands for a GPU, where each of two bandwidths has graphs of its own.
    """
    model = small(encoder_depth=2, decoder_depth=3).to(device)
    eager = losses(model, (16, 32), device)
    names = list(model.state_dict())
    called = compile_network(model, 2, backend=counter)
    for loss, expected in zip(losses(called, (16, 32), device), eager, strict=True):
        assert device == "meta" or torch.equal(loss, expected)
    assert counter.frame_count == graphs
    losses(called, (16, 32), device)
    assert counter.frame_count == graphs
    assert list(model.state_dict()) == names


class Scaled(Block):
    """A block with a constant of its own, as the rate of drop path is.

    It is no number: early versions of torch make one an input of the second graph.
    """

    def __init__(self, marks: str):
        nn.Module.__init__(self)
        self.marks = marks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(self.marks)


def test_blocks_that_share_no_graph_compile_however_many_they_are(counter) -> None:
    """With drop path. Torch raises past its limits, 8 graphs and 256 in all."""
    torch._dynamo.config.accumulated_recompile_limit = 10
    for networks in (1, 2):
        network = nn.Sequential(*(Scaled("x" * (14 * networks + number)) for number in range(14)))
        scale = nn.Parameter(torch.ones((), device="meta"))  # as on a GPU
        network.register_parameter("scale", scale)
        compile_network(network, 1, backend=counter)(torch.ones(2))
        assert counter.frame_count == networks * len(network)


def test_work_beside_training_compiles_nothing_for_other_shapes(counter) -> None:
    model = small()
    compile_network(model, 1, backend=counter)
    do_work([SimpleNamespace(do=lambda _: losses(model, (32,)))], None)
    assert counter.frame_count == 0


def test_a_network_without_blocks_is_compiled_as_a_whole(counter) -> None:
    network = compile_network(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 1, backend=counter)
    network(torch.zeros(2, 3))
    assert counter.frame_count == 1


def test_gradient_checkpointing_composes_with_compiled_blocks(counter) -> None:
    model = small()
    model.set_gradient_checkpointing()
    compile_network(model, 1, backend=counter)
    (loss,) = losses(model, (32,))
    loss.backward()
    assert counter.frame_count > 0
    for parameter in model.encoder.blocks.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_sharding_composes_with_compiled_blocks(counter, alone_in_a_group) -> None:
    model = small()
    (eager,) = losses(model, (32,))
    shard(model, DistributedContext(0, 1, torch.device("cpu")))
    (loss,) = losses(compile_network(model, 1, backend=counter), (32,))
    loss.backward()
    assert torch.equal(loss, eager)
    assert counter.frame_count > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_threads_of_the_backward_pass_start_before_a_loader_pins_memory(
    counter, monkeypatch, device: str
) -> None:
    """Of any device but a CPU, whose backward pass runs in the thread that calls it."""
    started = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: started.append(loss.device.type))
    compile_network(small().to(device), 1, backend=counter)
    assert started == ["meta"] * (device == "meta")


def test_blocks_are_not_split_at_the_buckets_of_data_parallel_training(
    counter, alone_in_a_group
) -> None:
    """A block of ViT-B is larger than one of torch's buckets."""
    model = small(encoder_embed_dim=192, encoder_depth=1)  # 1.8 MB
    network = DistributedDataParallel(compile_network(model, 1, backend=counter), bucket_cap_mb=1)
    losses(network, (32,))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_two_ranks_train_sharded_and_compiled_as_they_do_eagerly(tmp_path) -> None:
    """With gradients that are accumulated and exchanged, and blocks gathered anew to recompute."""
    flags = [
        "--efficiency.sharding=full", "--efficiency.micro_batch=3", "--curriculum.epochs=2",
        "--efficiency.gradient_checkpointing=true", "--output.log_every=1",
    ]  # fmt: skip
    rows = []
    for compiles in ("false", "true"):
        folder = tmp_path / compiles
        switch = [f"--efficiency.compile={compiles}", f"--output.dir={folder}"]
        started = start(tmp_path, 2, *flags, *switch, target=aot_eager_rank)
        done = started.finish(600)
        assert done.returncode == 0, done.stderr
        rows.append(read_metrics(folder))
    assert "mae-et: compiled for bandwidth 16 in " in done.stderr
    for key in ("loss", "grad_norm"):
        expected, found = ([row[key] for row in mine] for mine in rows)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("requested", "plan", "device", "expected"),
    [
        (True, SHORT, "cpu", True),
        (False, LONG, "cuda", False),
        ("auto", LONG, "cuda", True),
        ("auto", SHORT, "cuda", False),
        ("auto", LONG, "cpu", False),
    ],
)
def test_auto_compiles_long_runs_on_a_gpu(
    monkeypatch, requested, plan, device: str, expected: bool
) -> None:
    monkeypatch.setattr(compiling, "compiler_fault", lambda _: "")
    world = DistributedContext(0, 1, torch.device(device))
    assert should_compile(requested, plan, world) is expected


def test_auto_runs_eagerly_where_compilation_fails(monkeypatch, capsys) -> None:
    """As on a node without a C compiler, which Triton needs."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)  # not on a GPU that is missing
    for _ in range(2):
        assert not should_compile("auto", LONG, ON_A_GPU)
    assert capsys.readouterr().err.count("torch.compile fails: Failed to find C compiler.") == 1
    assert should_compile(True, LONG, ON_A_GPU)


def test_auto_compiles_on_all_ranks_or_on_none(monkeypatch, capsys) -> None:
    monkeypatch.setattr(compiling, "compiler_fault", lambda _: "")
    monkeypatch.setattr(compiling, "any_rank", lambda *_: True)
    assert not should_compile("auto", LONG, ON_A_GPU)
    assert "torch.compile fails: on another rank" in capsys.readouterr().err


def test_each_graph_that_is_compiled_counts_as_progress(monkeypatch, capsys) -> None:
    beats: list[int] = []
    monkeypatch.setattr(compiling, "heartbeat", lambda: beats.append(1))
    for _ in range(3):  # registered once
        network = compile_network(nn.Linear(2, 2), backend="eager")
    for count in (1, 2):
        network(torch.ones(count, 2))
        assert len(beats) == 2 * count  # start and end
        for _ in range(2):
            report_compilation(count)
        assert capsys.readouterr().err.count(f"compiled for bandwidth {count} in ") == 1
