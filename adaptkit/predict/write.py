"""Answers as files: PNG for maps, JSON for the rest, in the formats of COCO where it has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptkit.hub.write import write_atomic
from adaptkit.predict.answers import Answer, Depth, Detection, Panoptic, Segmentation
from adaptkit.predict.draw import overlay

__all__ = ["Written", "depth_scale"]


class Written:
    """A folder of answers: ``<name>.png`` for a map, ``<name>_overlay.png``, and ``predictions.json`` for all.

    ``predictions.json`` is a list: of a detector COCO's results, an entry for each object; of panoptic segmentation
    COCO's ``annotations``; else an entry for each picture.
    """

    def __init__(self, folder: Path, draws: bool = True) -> None:
        self.folder, self.draws = folder, draws
        self.entries: list[dict[str, Any]] = []

    def add(self, name: str, answer: Answer, image: np.ndarray | None, image_id: int) -> None:
        """Write the files of one picture (H, W, 3) uint8; ``name`` may have folders in it.

        Raises ``OSError`` where they cannot be written.
        """
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        said: dict[str, Any] = {"file": name, "image_id": image_id, **answer.json()}
        if isinstance(answer, Segmentation):
            _png(answer.mask, place)
        elif isinstance(answer, Depth):
            said["depth_scale"] = depth_scale(answer.depth)
            values = answer.depth * np.float32(said["depth_scale"])
            _png(np.clip(values.round(), 0, 65535).astype(np.uint16), place)
        elif isinstance(answer, Panoptic):
            ids: np.ndarray = answer.segments.astype(np.uint32)
            _png(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8), place)
            said = {"image_id": image_id, "file_name": f"{name}.png", "segments_info": answer.found}
        self.entries += answer.coco(image_id) if isinstance(answer, Detection) else [said]
        if self.draws and image is not None:
            overlay(image, answer).save(place.with_name(f"{place.name}_overlay.png"))

    def close(self) -> Path:
        """Write ``predictions.json``; returns its path."""
        path = self.folder / "predictions.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(self.entries, indent=1) + "\n").encode())
        return path


def depth_scale(depth: np.ndarray) -> int:
    """Return the values per metre of a 16-bit PNG: 1000, as NYU has it, or KITTI's 256 where that is too far."""
    return 1000 if float(depth.max(initial=0)) * 1000 <= 65535 else 256


def _png(values: np.ndarray, place: Path) -> None:
    Image.fromarray(values).save(place.with_name(f"{place.name}.png"))
