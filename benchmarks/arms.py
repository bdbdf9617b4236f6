"""Arms of `mae-et bench quality`: pre-training runs to compare."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """Changes to the pre-training run of the config."""

    flags: tuple[str, ...] = ()
    """Flags, as on the command line."""
    budget: float = 1
    """Multiple of the compute; 0 leaves the encoder untrained."""
    images_of: str | None = None
    """Arm whose number of images to match, at any compute."""
    time_of: str | None = None
    """Arm whose time to match, from measured times per step, at any compute."""
    replay: tuple[int, ...] = ()
    """Uses of each loaded image, starting at the smallest bandwidth."""


PLAIN = ("--curriculum.preset=constant",)
ETPP = ("--curriculum.preset=etpp",)
HOG = ("--model.target=hog",)
# Decoders: MAE's proportions (2/3 of the encoder's width and depth); a quarter of that depth; and
# CrossMAE's at half the depth, predicting a third of the hidden patches.
FULL = (*PLAIN, "--model.decoder_depth=8")
SHALLOW = (*PLAIN, "--model.decoder_depth=2")
CROSS = (
    *PLAIN, "--model.decoder_depth=4", "--model.decoder_attention=cross",
    f"--model.decoder_share={1 / 3}",
)  # fmt: skip
ARMS = {
    "untrained": Arm(PLAIN, budget=0),
    "plain": Arm(PLAIN),
    "plain-2x": Arm(PLAIN, budget=2),
    "plain-4x": Arm(PLAIN, budget=4),
    "plain-8x": Arm(PLAIN, budget=8),
    "plain-hog": Arm(PLAIN + HOG),
    "plain-hog-2x": Arm(PLAIN + HOG, budget=2),
    "plain-hog-4x": Arm(PLAIN + HOG, budget=4),
    "etpp": Arm(ETPP),
    "etpp-2x": Arm(ETPP, budget=2),
    "etpp-4x": Arm(ETPP, budget=4),
    "etpp-hog": Arm(ETPP + HOG),
    "etpp-hog-2x": Arm(ETPP + HOG, budget=2),
    "etpp-hog-4x": Arm(ETPP + HOG, budget=4),
    "etpp-equal-images": Arm(ETPP, images_of="plain"),
    "etpp-resize": Arm((*ETPP, "--crop.method=resize")),
    "etpp-own-grid": Arm((*ETPP, "--model.positions=own_grid")),
    # The release's buffer: 4 times in the first stages, 2 in the next, off at full bandwidth.
    "etpp-replay": Arm(ETPP, replay=(4, 2)),
    "decoder-full": Arm(FULL),
    "decoder-shallow": Arm(SHALLOW),
    "decoder-cross": Arm(CROSS),
    "decoder-shallow-equal-time": Arm(SHALLOW, time_of="decoder-full"),
    "decoder-cross-equal-time": Arm(CROSS, time_of="decoder-full"),
}
# Plain MAE at increasing compute, by target: reference curves for the other arms.
CURVES = {
    "plain MAE": ("plain", "plain-2x", "plain-4x", "plain-8x"),
    "plain MAE with HOG": ("plain-hog", "plain-hog-2x", "plain-hog-4x"),
}
