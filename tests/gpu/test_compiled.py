"""Compiled blocks compute what eager ones do, at every bandwidth, in float32 and in bf16."""

import threading

import pytest
import torch
import torch._dynamo.testing
from small_mae import small

from mae_et.models.masking import mask_from_noise
from mae_et.runtime.precision import autocast
from mae_et.training.efficiency.compile import compile_network, compiler_fault

SIDES = (16, 32)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_compiled_blocks_have_the_losses_and_gradients_of_eager_ones(
    device: torch.device, dtype: torch.dtype | None
) -> None:
    # On a CPU, generating and building C++ takes minutes.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    if backend == "inductor" and (fault := compiler_fault(device)):
        pytest.skip(f"torch.compile fails here: {fault}")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    model = small(encoder_depth=3, decoder_depth=2).to(device)
    network = compile_network(model, len(SIDES), backend)

    def gradients() -> list[torch.Tensor]:
        found = []
        generator = torch.Generator().manual_seed(0)
        for side in SIDES:
            images = torch.randn(4, 3, side, side, generator=generator).to(device)
            noise = torch.rand(4, (side // 8) ** 2, generator=generator).to(device)
            with autocast(dtype, device):
                loss = network(images, mask_from_noise(noise, 0.75)).loss
            model.zero_grad()
            loss.backward()
            every = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.cat([loss.detach()[None], *every]).cpu())
        return found

    try:
        compiled = gradients()
        graphs = counters["unique_graphs"]
        assert 3 <= graphs <= 3 * len(SIDES)  # shared by five blocks
        again = gradients()
        assert counters["unique_graphs"] == graphs  # no recompilation
        with torch.compiler.set_stance("force_eager"):
            eager = gradients()
    finally:
        torch._dynamo.reset()
    tolerance = 1e-3 if dtype is None else 0.1
    for found, repeated, expected in zip(compiled, again, eager, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert (repeated - expected).norm() <= tolerance * expected.norm()


def test_gradient_checkpointing_compiles_nothing_in_the_backward_pass(device: torch.device) -> None:
    """On a GPU it runs in threads of autograd, after a loader that pins memory has started."""
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounter()
    model = small(encoder_depth=3, decoder_depth=2).to(device)
    model.set_gradient_checkpointing()
    network = compile_network(model, len(SIDES), backend)
    pinning = threading.Thread(target=torch.set_num_threads, args=(1,))  # as DataLoader's does
    pinning.start()
    pinning.join()
    try:
        for side in SIDES:
            noise = torch.rand(4, (side // 8) ** 2, device=device)
            images = torch.randn(4, 3, side, side, device=device)
            loss = network(images, mask_from_noise(noise, 0.75)).loss
            compiled = backend.frame_count
            loss.backward()
            assert backend.frame_count == compiled
    finally:
        torch._dynamo.reset()
