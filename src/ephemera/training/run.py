"""What every training command does first: processes, model, and the run's folder with its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available

from ephemera.config import TrainGenerator, TrainLens, TrainScaleNet, TrainTaskLora, check_config, dump_yaml
from ephemera.llm import processes
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.saving import json_text
from ephemera.training.loop import clear

Run = TrainScaleNet | TrainGenerator | TrainTaskLora | TrainLens
Settings = TypeVar("Settings", TrainScaleNet, TrainGenerator, TrainTaskLora, TrainLens)


def open_run(config: Run, folder: Path, **sits: Any) -> tuple[Accelerator, FrozenLM]:
    """The accelerator, with its trackers, and the frozen model on its device; `sits`: where its adapters are."""
    available = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    for tracker in config.trackers:
        if not available[tracker]:
            raise ValueError(f"trackers names {tracker}, which is not installed: pip install 'ephemera[{tracker}]'.")
    if config.model.cut:
        raise ValueError(
            f"model.parallel={config.model.parallel}: a training process holds the whole model, and takes its own rows. Leave it "
            "out (torchrun alone trains on several processes), or use offload."
        )
    accelerator = Accelerator(
        cpu=config.model.device == "cpu", log_with=list(config.trackers) or None, project_dir=str(folder)
    )
    if config.trackers:
        accelerator.init_trackers("ephemera", config=_flat(config.model_dump(mode="json")))
    backbone = config.model.load(spread=True, device=config.model.device or accelerator.device, **sits)
    settings = config.model_dump(mode="json", exclude={"output"})
    processes.check_same("settings or models", (settings, backbone.fingerprint()), accelerator.device)
    return accelerator, backbone


def _flat(settings: dict[str, Any], start: str = "") -> dict[str, Any]:
    """{"optimizer.seed": 0, ...}: trackers take numbers and texts alone."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{start}{key}.")
        else:
            flat[start + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def kept_settings(config: Settings, folder: Path) -> Settings | None:
    """The settings of the run that a resumed one goes on with; others would be ignored, so they are refused.

    The first process reads them for all.
    """
    return processes.by_first(lambda: _kept_settings(config, folder))


def _kept_settings(config: Settings, folder: Path) -> Settings | None:
    saved = folder / "config.json"
    if not saved.exists():
        return None
    try:
        kept = check_config(type(config), json.loads(saved.read_text()))
    except ValueError as error:
        raise ValueError(
            f"--resume: {saved} holds no settings of such a run ({error}). Give another output."
        ) from error
    old, new = kept.model_dump(exclude={"output"}), config.model_dump(exclude={"output"})
    searched = old.get("scalenet") and new.get("scalenet")
    if searched and new["scalenet"]["base_rates"] is None:  # searched by the first run, and kept
        new["scalenet"]["base_rates"] = old["scalenet"]["base_rates"]
    changed = [key for key in old if old[key] != new[key]]
    if changed:
        raise ValueError(
            f"--resume: the run in {folder} has other settings ({', '.join(changed)} differ). Resume with the settings of "
            f"{folder / 'config.yaml'}, or give another output."
        )
    return kept


def begin(config: Run, folder: Path, accelerator: Accelerator, *, beside: dict[str, Any] | None = None) -> None:
    """Make way for a new run, and keep its whole configuration (and what stands `beside` it) in its folder."""
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        for name, value in (beside or {}).items():
            (folder / f"{name}.json").write_text(json_text(value, indent=1) + "\n")
        scratch = folder / "config.partial"
        scratch.write_text(json_text(config.model_dump(mode="json"), indent=1) + "\n")
        scratch.replace(folder / "config.json")
        (folder / "config.yaml").write_text(dump_yaml(config))
    accelerator.wait_for_everyone()
