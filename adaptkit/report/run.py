"""What a run recorded, read back: config.yaml, metrics.jsonl, result.json, evaluation.json and pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptkit.report.words import SCORE, TASK_OF

__all__ = ["FILES", "Run", "found", "read"]

FILES = ("config.yaml", "metrics.jsonl", "result.json", "evaluation.json")


@dataclass
class Run:
    """One run; what it did not record is empty."""

    name: str
    path: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  #: of metrics.jsonl
    result: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options that it was trained with."""
        return self.config.get("options") or {}

    @property
    def seed(self) -> int | None:
        """Of the training."""
        return self.options.get("seed")

    @property
    def task(self) -> str | None:
        """What it predicts, one of ``SCORE``; None where nothing says it."""
        recipe = (self.config.get("run") or {}).get("recipe")
        return self.evaluation.get("task") or TASK_OF.get(str(recipe))

    @property
    def metric(self) -> str | None:
        """Which number is its score."""
        return SCORE.get(str(self.task))

    @property
    def score(self) -> float | None:
        """Its score, of the evaluation of the file, else of the last validation."""
        name = self.metric
        if name is None:
            return None
        rows = [row for row in self.rows if name in row]
        return self.evaluation.get(name, rows[-1][name] if rows else None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of the score over images."""
        between = (self.evaluation.get("interval") or {}).get(self.metric)
        return (between[0], between[1]) if between else None

    @property
    def is_finished(self) -> bool:
        """Whether it trained to its end."""
        return bool(self.result)

    def seconds(self) -> float | None:
        """Of training."""
        told = [row["seconds"] for row in self.rows if "seconds" in row]
        return self.result.get("seconds", told[-1] if told else None)

    def memory(self) -> float | None:
        """Peak memory in MiB."""
        told = [row["memory_mib"] for row in self.rows if "memory_mib" in row]
        return self.result.get("peak_memory_mib", told[-1] if told else None)

    def picture(self, name: str) -> str | None:
        """Return a picture as a data URL; None where its file is gone."""
        if self.path is None:
            return None
        file = self.path / name
        if not file.is_file() or not file.resolve().is_relative_to(self.path.resolve()):
            return None
        kind = {".webp": "webp", ".png": "png", ".jpg": "jpeg"}.get(file.suffix.lower())
        return kind and f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def read(path: str | Path) -> Run:
    """Read the folder of a run. ``ValueError`` where it holds none, or a file that is none."""
    folder = Path(path).expanduser()
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} holds no run: none of {', '.join(FILES)} is there")
    return Run(
        folder.resolve().name if folder.name in ("", "..") else folder.name,
        folder,
        _yaml(folder / FILES[0]),
        _rows(folder / FILES[1]),
        _json(folder / FILES[2]),
        _json(folder / FILES[3]),
    )


def found(paths: Sequence[str | Path]) -> list[Run]:
    """Read runs, and of a folder of runs all of them. ``ValueError`` names one that holds none."""
    runs: dict[Path, Run] = {}
    for path in paths:
        folder = Path(path).expanduser()
        within = sorted(p for p in folder.iterdir() if p.is_dir() and _is_run(p)) if folder.is_dir() else []
        for one in [folder] if _is_run(folder) or not within else within:
            runs.setdefault(one.resolve(), read(one))
    return list(runs.values())


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    return said if isinstance(said, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; make it again, or take it away") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no JSON object; make it again, or take it away")
    return said


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # a killed run may end in half a line
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
