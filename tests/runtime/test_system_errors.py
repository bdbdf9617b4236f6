"""Errors of the machine become one sentence."""

import numpy as np
import pytest
import torch

from mae_et.errors import RunFailed
from mae_et.runtime.system_errors import explain_system_errors


def test_impossible_allocations_report_out_of_memory() -> None:
    def in_numpy() -> None:
        np.empty(10**15)

    def in_torch() -> None:
        torch.empty(10**15)

    def beyond_int64() -> None:
        torch.empty(2**40, 2**40)

    for ask in (in_numpy, in_torch, beyond_int64):
        with pytest.raises(RunFailed, match=r"^out of memory: sizes of"), explain_system_errors():
            ask()
