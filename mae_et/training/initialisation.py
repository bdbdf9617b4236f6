"""Start a new run from other weights (`init.weights`)."""

from mae_et.checkpoints.formats import load_weights
from mae_et.checkpoints.initial_weights import initialise_from
from mae_et.checkpoints.preprocessing import Preprocessing
from mae_et.config.data import DataConfig
from mae_et.config.schema import PretrainConfig
from mae_et.models.mae import MaskedAutoencoder
from mae_et.runtime.agreement import check_ranks_agree, fail_together
from mae_et.runtime.console import say
from mae_et.runtime.distributed import DistributedContext


def load_initial_weights(
    model: MaskedAutoencoder, config: PretrainConfig, world: DistributedContext
) -> str | None:
    """Load the config's initial weights into a new model, and report them.

    The model must be on the CPU, neither wrapped nor sharded: every rank loads all weights.

    Returns:
        SHA-256 of the weights, recorded in checkpoints; None without `init.weights`.

    Raises:
        UserError: the weights cannot be read, have another architecture, or differ between ranks.
    """
    path = config.init.weights
    if path is None:
        return None
    with fail_together(world):
        weights = load_weights(path, config.init.checkpoint_key)
        initial = initialise_from(model, config.model, config.init, weights)
    check_ranks_agree({"the hash of init.weights": initial.sha256}, world)
    if world.is_main:
        statistics = _describe_statistics(weights.preprocessing, config.data)
        say(f"starting from {path} (sha256 {initial.sha256[:12]}): {initial.summary}; {statistics}")
    return initial.sha256


def _describe_statistics(recorded: Preprocessing | None, data: DataConfig) -> str:
    """Describe whether images are prepared as for the weights, as part of a sentence."""
    if recorded is None:
        return "the weights record no mean and std: those of the config are used"
    differing = recorded.differences(data)
    return f"but {', '.join(differing)}" if differing else "mean and std as for the weights"
