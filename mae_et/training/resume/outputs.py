"""Outputs that a finished run lacks."""

from mae_et.config.schema import RunConfig


def missing_outputs(config: RunConfig) -> list[str]:
    """Return the outputs, besides results.json, that the run folder lacks.

    A finished run writes them again, from its last checkpoint if there is one.
    """
    return [name for name in config.outputs if not (config.output.dir / name).exists()]
