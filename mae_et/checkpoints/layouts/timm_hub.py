"""Fetch timm models from their hub, by name."""

import logging
from pathlib import Path
from typing import Any

import timm

from mae_et.config.suggestions import suggest
from mae_et.errors import UserError, one_line
from mae_et.runtime.console import say


def require_checkpoint(path: Path) -> None:
    """Refuse a path that is neither a file or folder nor timm's name of a model."""
    if not (path.exists() or timm.is_model(str(path))):
        meant = suggest(str(path), timm.list_models())
        raise UserError(f"there is no checkpoint {path}{meant}")


def fetch_from_hub(name: str, **arguments: Any) -> Any:
    """Create a timm model with its published weights; refuse a name that timm does not know."""
    require_checkpoint(Path(name))
    say(f"fetching {name} from timm's hub, unless it is cached")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each retry
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"timm cannot fetch {name} from its hub: {one_line(error)}") from error
