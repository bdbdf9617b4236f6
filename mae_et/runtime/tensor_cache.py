"""Cache tensors that are functions of sizes, independently of the first caller's mode."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

Sizes = ParamSpec("Sizes")
Result = TypeVar("Result")


def cache_tensors(maxsize: int) -> Callable[[Callable[Sizes, Result]], Callable[Sizes, Result]]:
    """Cache a function's tensors like `functools.lru_cache`, safely for every later caller.

    In inference mode, ordinary tensors are created: inference tensors cannot be saved for a
    backward pass. While torch.export or torch.compile traces, or under a `FakeTensorMode`, nothing
    is cached: those tensors have no values.
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
