"""Fetch timm models from their hub."""

from typing import Any

import timm

from mae_et.errors import UserError, one_line


def fetch_from_hub(name: str, **arguments: Any) -> Any:
    """Create a timm model with its published weights.

    Raises:
        UserError: the model cannot be fetched or built.
    """
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"timm cannot fetch {name} from its hub: {one_line(error)}") from None
