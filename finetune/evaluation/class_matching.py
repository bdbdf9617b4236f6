"""Match a dataset's classes to a classifier's outputs: the same, reordered, or a subset."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mae_et.errors import UserError, listed


class SelectedClasses(nn.Module):
    """Keep a network's logits of some classes, as ImageNet-A and ImageNet-R have 200 of 1,000."""

    def __init__(self, network: nn.Module, indices: Sequence[int]):
        super().__init__()
        self.network = network
        self.register_buffer("indices", torch.tensor(indices), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B C H W] -> [B selected classes]."""
        return self.network(images)[:, self.indices]


def match_classes(
    path: Path, outputs: int, names: Sequence[str] | None, classes: Sequence[str]
) -> tuple[list[int], str]:
    """Find the output of a classifier for each of a dataset's named classes; also word the match.

    With `names` the classes are matched by name. Otherwise they are matched by number if their
    names are numbers below `outputs`, by ImageNet's order if there are 1,000 outputs and the names
    are its synsets (n01440764), and else by order, which requires as many classes as outputs.
    """
    synsets = _imagenet_synsets(outputs)
    if synsets and not set(names or ()) >= set(classes) and set(classes) <= synsets.keys():
        part = _part(classes, outputs)
        return [synsets[name] for name in classes], f"matched by ImageNet's synsets{part}"
    if names is not None:
        indices = _match_names(path, outputs, names, classes)
        return indices, f"matched by name{_part(classes, outputs)}"
    if all(name.isdecimal() and int(name) < outputs for name in classes):
        return list(map(int, classes)), f"matched by number{_part(classes, outputs)}"
    if len(classes) != outputs:
        raise UserError(
            f"{path} has {outputs} classes without names, the dataset has {len(classes)}: name "
            "their folders 0, 1, ... to score a part of the classes"
        )
    order = f" ({', '.join(classes[:3])}, ...)" if all(map(str.isdecimal, classes)) else ""
    return list(range(outputs)), f"matched by order{order}, as the checkpoint records no names"


def _match_names(
    path: Path, outputs: int, names: Sequence[str], classes: Sequence[str]
) -> list[int]:
    if len(names) > outputs:
        raise UserError(f"{path} has {outputs} classes, and names {len(names)}")
    if list(names) == list(classes):
        return list(range(len(names)))
    number = {name: place for place, name in enumerate(names)}
    unknown = [name for name in classes if name not in number]
    if unknown:
        raise UserError(
            f"{path} has {outputs} classes, and {len(unknown)} of the dataset's {len(classes)} are "
            f"not among them ({listed(unknown)})"
        )
    counts = Counter(names)
    repeated = [name for name in classes if counts[name] > 1]
    if repeated:
        raise UserError(f"{path} has {counts[repeated[0]]} classes named {repeated[0]}")
    return [number[name] for name in classes]


def _imagenet_synsets(outputs: int) -> dict[str, int]:
    """Return the output of each ImageNet-1K synset; empty unless there are 1,000 outputs."""
    if outputs != 1000:
        return {}
    from timm.data import ImageNetInfo

    return {name: place for place, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _part(classes: Sequence[str], outputs: int) -> str:
    if len(classes) == outputs:
        return ""
    return f", {len(classes)} of {outputs}: the other classes are not candidates"
