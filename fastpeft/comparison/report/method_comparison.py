"""A finished cell in the schema of PEFT's `method_comparison`, so that its tools and readers take it.

What a run here does not know is null: it keeps the peak of memory, not its course. All that is measured is called
valid, because it is measured on the dev part; the suite's own runs have a test part besides.

Source: the results and the README of github.com/huggingface/peft/tree/main/method_comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastpeft.comparison.cells import Cell
from fastpeft.data.problems import in_order, title_of
from fastpeft.support import files
from fastpeft.support.adapter_files import CONFIG

FOLDER = "method_comparison"
Curves = Mapping[str, Sequence[tuple[int, float]]]  # (step, value), by name


def result(cell: Cell, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `run_info`, `train_info` and `meta_info` say of a cell that has these metrics."""
    folder = cell.folder.path
    adapter = folder / CONFIG
    ended = datetime.fromtimestamp(cell.folder.metrics_file.stat().st_mtime, UTC)
    peak = metrics.get("peak_memory_mb")
    return {
        "run_info": {
            "created_at": ended.isoformat(timespec="seconds"),
            "total_time": cell.seconds(),
            "experiment_name": f"{cell.method}/{cell.name}",
            "peft_branch": None,
            "train_config": _train_config(cell, metrics),
            "peft_config": files.read_json(adapter) if adapter.is_file() else None,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": None if peak is None else round(peak * 2**20),
            "accelerator_memory_reserved_99th": None,
            "train_time": metrics.get("train_seconds"),
            "file_size": sum(path.stat().st_size for path in _weights(folder)),
            "num_trainable_params": metrics.get("trainable_parameters"),
            "num_total_params": metrics.get("parameters"),
            "status": "success",
            "metrics": _course(cell, metrics),
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {Path(str(metrics.get("data", ""))).name: {"sha": None, "created_at": None}},
            "package_info": {f"{name}-version": version for name, version in metrics.get("versions", {}).items()},
            "system_info": {"accelerator": metrics.get("device"), "memory": metrics.get("peak_memory_source")},
            "pytorch_info": None,
        },
    }


def _train_config(cell: Cell, metrics: Mapping[str, Any]) -> dict[str, Any]:
    file = cell.folder.config_file
    run = files.read_json(file) if file.is_file() else {}
    recipe = run.get("recipe", {})
    return {
        "model_id": run.get("model"),
        # of the frozen weights
        "dtype": run.get("settings", {}).get("backbone_dtype") or run.get("dtype") or "float32",
        "max_seq_length": metrics.get("max_length"),
        "batch_size": run.get("batch_size"),
        "max_steps": metrics.get("steps"),
        "eval_steps": next((step for step in _measured(cell.curves() or {}) if step), None),
        "seed": cell.seed,
        "optimizer_kwargs": {
            "lr": metrics.get("learning_rate"),
            **({} if (of_head := metrics.get("head_learning_rate")) is None else {"head_lr": of_head}),
            "weight_decay": recipe.get("weight_decay"),
        },
        "lr_scheduler": recipe.get("schedule"),
        "use_amp": metrics.get("compute_dtype", "float32") != "float32",
    }


def _weights(folder: Path) -> list[Path]:
    """The files of a result's weights: a side network's, and beside it those of an adapter that trained with it."""
    return [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]  # none of a checkpoint


def _measured(curves: Curves) -> dict[int, dict[str, Any]]:
    """What was measured of the dev rows on the way, by step: at the start, and then every so many steps."""
    points: dict[int, dict[str, Any]] = {}
    for name, values in curves.items():
        if name.startswith("dev "):
            for step, value in values:
                points.setdefault(step, {"step": step})[f"valid {title_of(name.removeprefix('dev '))}"] = value
    return {step: points[step] for step in sorted(points)}


def _course(cell: Cell, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was measured on the way, each with the last training loss before it; last what the kept weights reach.

    The loss is the one that training lowers, whichever kind it is: weighted or smoothed as well.
    """
    curves = cell.curves() or {}
    last = {f"valid {title_of(name)}": metrics[name] for name in in_order(metrics)}
    course = [*_measured(curves).values(), {"step": metrics.get("best_step") or metrics.get("steps"), **last}]
    losses = next((values for name, values in curves.items() if name.endswith("training loss")), [])
    for point in course:
        before = [loss for step, loss in losses if point["step"] is None or step <= point["step"]]
        point["train loss"] = before[-1] if before else None
    return course
