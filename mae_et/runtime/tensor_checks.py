"""Checks of tensors that a user's own code passes."""

from torch import Tensor


def check_images(images: object, shape: str, floating: bool = True) -> None:
    """Refuse what is no tensor of images of a shape.

    Args:
        images: the argument of this name.
        shape: letters and sizes of the dimensions, such as `B 3 H W`; `... H W` may have more.
        floating: whether the numbers must be floating-point.

    Raises:
        ValueError: the sentence says what the images must be, and what they are.
    """
    got = type(images).__name__
    if isinstance(images, Tensor):
        names = shape.removeprefix("... ").split()
        sizes = images.shape[-len(names) :] if shape.startswith("...") else images.shape
        pairs = list(zip(names, sizes, strict=False))
        fits = len(names) == len(sizes) and all(n.isalpha() or int(n) == size for n, size in pairs)
        if fits and (images.is_floating_point() or not floating):
            return
        got = f"{images.dtype} {list(images.shape)}"
    kind = "floating-point tensor" if floating else "tensor"
    raise ValueError(f"images must be a {kind} [{shape}], got {got}")
