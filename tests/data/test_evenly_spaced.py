"""Some images of a list represent all of it."""

import numpy as np
import pytest

from mae_et.data.evenly_spaced import drawn_evenly, evenly_spaced


@pytest.mark.parametrize("most", [1, 7, 16, 40])
def test_both_choices_are_rising_indices_of_the_whole_list(most: int) -> None:
    for count in (*range(most, 60), 14_197_122):
        for chosen in (evenly_spaced(count, most), drawn_evenly(count, most)):
            assert len(chosen) == most
            assert chosen[0] >= 0
            assert chosen == sorted(set(chosen))
            assert chosen[-1] < count
            assert np.diff(chosen).max(initial=0) <= 2 * -(-count // most)
    assert evenly_spaced(3, 5) == [0, 1, 2]


def test_drawn_images_are_of_all_classes_of_a_list_that_is_sorted_or_repeats_them() -> None:
    chosen = np.array(drawn_evenly(2000, 200))
    assert np.bincount(chosen // 200).tolist() == [20] * 10
    assert np.bincount(chosen % 10, minlength=10).min() > 5
    assert len(set(np.array(evenly_spaced(2000, 201)) % 10)) < 10  # what steps of 10 would meet
