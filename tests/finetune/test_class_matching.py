"""Classes of a dataset and outputs of a classifier, matched by name, number or order."""

from pathlib import Path

import pytest
import torch

from finetune.evaluation.class_matching import SelectedClasses, match_classes
from mae_et import UserError

PATH = Path("weights.pth")
ANIMALS = ["ant", "bee", "cat", "dog"]
SYNSETS = ["n01440764", "n02102040", "n15075141"]  # tench, English springer, toilet tissue
NUMBERS = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("outputs", "names", "classes", "indices", "how"),
    [
        (4, ANIMALS, ANIMALS, [0, 1, 2, 3], "matched by name"),
        (4, ANIMALS, ["dog", "ant", "cat", "bee"], [3, 0, 2, 1], "matched by name"),
        (4, ANIMALS, ["bee", "dog"], [1, 3], "matched by name, 2 of 4: the other classes are no"),
        (3, ["0", "1", "10"], ["10", "0"], [2, 0], "matched by name, 2 of 3"),
        (4, None, ANIMALS, [0, 1, 2, 3], "matched by order, as the checkpoint records no names"),
        (12, None, sorted(NUMBERS), [0, 1, 10, 11, *range(2, 10)], "matched by number"),
        (12, None, ["3", "10"], [3, 10], "matched by number, 2 of 12"),
        (2, None, ["1", "2"], [0, 1], "matched by order (1, 2, ...), as the checkpoint records no"),
        (1000, None, SYNSETS, [0, 217, 999], "matched by ImageNet's synsets, 3 of 1000"),
        (1000, ["tench, Tinca tinca"], SYNSETS, [0, 217, 999], "matched by ImageNet's synsets"),
        (1000, SYNSETS[::-1], SYNSETS[:1], [2], "matched by name"),
        (3, ["crane", "tench", "crane"], ["tench"], [1], "matched by name, 1 of 3"),
        (3, ["crane", "tench", "crane"], ["crane", "tench", "crane"], [0, 1, 2], "matched by name"),
    ],
)
def test_each_class_has_its_output(outputs, names, classes, indices, how: str) -> None:
    found, sentence = match_classes(PATH, outputs, names, classes)
    assert found == indices
    assert sentence.startswith(how)


@pytest.mark.parametrize(
    ("outputs", "names", "classes", "sentence"),
    [
        (4, ANIMALS, ["ant", "emu"], r"1 of the dataset's 2 are not among them \(emu\)"),
        (4, ANIMALS, ["ANT", "Bee"], r"2 of the dataset's 2 .* \(ANT, Bee\)"),
        (3, ["crane", "tench", "crane"], ["crane", "tench"], "has 2 classes named crane"),
        (3, ANIMALS, ["bee"], "weights.pth has 3 classes, and names 4"),
        (4, None, ["ant", "emu"], "4 classes without names, the dataset has 2: name their folders"),
        (2, None, ["1", "2", "3"], "2 classes without names, the dataset has 3"),
    ],
)
def test_classes_without_an_output_are_refused(outputs, names, classes, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        match_classes(PATH, outputs, names, classes)


def test_dropped_classes_are_no_candidates() -> None:
    network = torch.nn.Linear(5, 4)
    images = torch.randn(3, 5)
    found = SelectedClasses(network, [3, 1])(images)
    assert torch.equal(found, network(images)[:, [3, 1]])
