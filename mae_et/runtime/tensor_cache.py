"""Cache tensors that are functions of sizes, whatever mode their first caller is in."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

Sizes = ParamSpec("Sizes")
Result = TypeVar("Result")


def cache_tensors(
    maxsize: int,
) -> Callable[[Callable[Sizes, Result]], Callable[Sizes, Result]]:
    """Decorate a function like `functools.lru_cache`, so that its tensors serve every later caller.

    In inference mode, plain tensors are made: others cannot be saved for a backward pass. While
    torch.export or torch.compile traces, or under a `FakeTensorMode`, nothing is kept: the tensors
    there have no values.
    """

    def decorate(compute: Callable[Sizes, Result]) -> Callable[Sizes, Result]:
        @lru_cache(maxsize)
        def cached(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Result:
            with torch.inference_mode(False):
                return compute(*args, **kwargs)

        @wraps(compute)
        def call(*args: Sizes.args, **kwargs: Sizes.kwargs) -> Result:
            if torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor:
                return compute(*args, **kwargs)
            return cached(*args, **kwargs)  # type: ignore[arg-type]  # sizes are hashable

        return call

    return decorate
