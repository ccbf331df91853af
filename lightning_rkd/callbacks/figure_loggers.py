"""Figures into whichever logger a Trainer has."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_rkd.utils.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Log a figure: as an image to TensorBoard, Weights & Biases and MLflow, elsewhere as a file in the log's folder.

    Args:
        logger: Any logger of Lightning's.
        name: Of the figure; slashes make groups, or folders.
        figure: What is logged.
        step: When.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = CSVLogger(folder, name="", version="")
        ...     log_figure(logger, "pictures/angles", Figure(), 20)
        ...     [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.png")]
        ['pictures/angles-20.png']
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, step)
    elif isinstance(logger, WandbLogger):
        from PIL import Image

        logger.log_image(name, [Image.open(io.BytesIO(_png(figure)))], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{name}-{step}.png")
    elif isinstance(logger, DummyLogger):  # of fast_dev_run
        return
    elif logger.log_dir or logger.save_dir:
        path = Path(str(logger.log_dir or logger.save_dir), *(_plain(part) for part in f"{name}-{step}.png".split("/")))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _png(figure))
    else:
        warnings.warn(
            f"{type(logger).__name__} has no folder and is none of TensorBoardLogger, WandbLogger and MLFlowLogger, so "
            f"the figure {name!r} is not logged; add a CSVLogger, which keeps figures as files",
            stacklevel=2,
        )


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)
