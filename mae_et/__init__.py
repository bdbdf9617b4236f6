"""Masked autoencoder pre-training under the EfficientTrain++ frequency curriculum."""

import lazy_loader

from mae_et.version import __version__ as __version__

# The exports in __init__.pyi load when they are first used: commands such as mae-et status need no
# PyTorch, which takes seconds to load.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
