"""Ranges of single config values."""

import pytest

from mae_et import UserError
from mae_et.config.data import DataConfig, check_statistics
from mae_et.config.efficiency import EfficiencyConfig


def test_mean_and_std_have_one_value_or_one_per_channel() -> None:
    check_statistics(DataConfig(mean=(0.5,), std=(0.5,)), 7)
    with pytest.raises(UserError, match="3 numbers for 1 channels"):
        check_statistics(DataConfig(), 1)


def test_num_workers_is_bounded() -> None:
    for workers in (-1, 10**6):
        with pytest.raises(
            UserError, match=rf"efficiency\.num_workers must lie in .*, got {workers}$"
        ):
            EfficiencyConfig(num_workers=workers)
