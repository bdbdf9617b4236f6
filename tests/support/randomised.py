"""Networks whose every parameter counts."""

import torch


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value that matters, so that no part can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()
