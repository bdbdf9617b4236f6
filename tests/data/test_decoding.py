"""Which files are images, and how many channels they have."""

import pytest

from mae_et import UserError
from mae_et.data.decoding import check_channels, extensions_for


def test_number_of_channels_decides_the_file_extensions() -> None:
    assert ".png" in extensions_for(3)
    assert extensions_for(7) == (".npy",)
    with pytest.raises(UserError, match="needs arrays"):
        check_channels(7)
