"""Changes to the configuration of a run before it is parsed."""

import copy
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]
"""A configuration of ``lightning-rkd fit``, as read from YAML."""


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Copy of a configuration with some entries changed, named by their dotted paths.

    As on the command line, ``init_args`` may be left out where there is a ``class_path``.
    """
    changed = copy.deepcopy(config)
    for path, value in settings.items():
        *parents, last = path.split(".")
        place = changed
        for parent in parents:
            place = _arguments(place, parent).setdefault(parent, {})
        _arguments(place, last)[last] = copy.deepcopy(value)
    return changed


def _arguments(place: Config, name: str) -> Config:
    """The dict that holds ``name``: the arguments of a class, or the place itself."""
    if "class_path" not in place or name in ("class_path", "init_args", "dict_kwargs"):
        return place
    return place.setdefault("init_args", {})  # type: ignore[no-any-return] # a Config


def with_steps(config: Config, steps: int) -> Config:
    """Copy that trains for a number of steps, its schedule included.

    The steps are divided into epochs of about 50, because a checkpoint is written after each.
    """
    epochs = next(n for n in range(max(1, steps // 50), 0, -1) if steps % n == 0)
    settings: dict[str, Any] = {"trainer.max_epochs": epochs, "data.init_args.batches_per_epoch": steps // epochs}
    model = config["model"].get("init_args", {})
    schedule = (model.get("lr_scheduler") or {}).get("init_args", {})
    for name in {"total_steps", "T_max"} & schedule.keys():
        length = steps if model.get("lr_interval") == "step" else epochs
        settings[f"model.init_args.lr_scheduler.init_args.{name}"] = length
    return with_settings(config, settings)
