"""Base of the callbacks."""

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_rkd.utils.private import import_pytorch_lightning

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
else:
    pytorch_lightning = import_pytorch_lightning()

    class Callback(pl.Callback, pytorch_lightning.Callback):
        """Callback for the Trainer and the LightningCLI of ``lightning`` and of ``pytorch_lightning``."""
