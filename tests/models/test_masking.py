import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_et.config.model import visible_patches
from mae_et.models.masking import mask_from_noise


@given(patches=st.integers(2, 256), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_mask_hides_n_minus_v_patches_and_restore_inverts_the_order(
    patches: int, ratio: float, seed: int
) -> None:
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        with pytest.raises(ValueError, match="at least one"):
            visible_patches(patches, ratio)
        return
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    mask = mask_from_noise(noise, ratio)
    assert mask.keep.shape == (3, visible)
    assert torch.equal(mask.hidden.sum(1), torch.full((3,), float(patches - visible)))
    assert torch.equal(mask.hidden.gather(1, mask.keep), torch.zeros(3, visible))
    hidden = mask.hidden.argsort(dim=1, descending=True, stable=True)[:, : patches - visible]
    order = torch.cat([mask.keep, hidden], dim=1)
    places = mask.restore.gather(1, order)
    assert torch.equal(places[:, :visible], torch.arange(visible).expand(3, -1))
    assert torch.equal(places.sort(1).values, torch.arange(patches).expand(3, -1))


def test_patches_with_the_least_noise_stay_visible() -> None:
    mask = mask_from_noise(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 0.5)
    assert mask.keep.tolist() == [[1, 3]]
    assert mask.hidden.tolist() == [[1, 0, 1, 0]]
    equal = mask_from_noise(torch.zeros(1, 196), 0.75)  # in raster order, whatever the device sorts
    assert torch.equal(equal.order[0], torch.arange(196))
