"""Where a folder keeps its images and their maps: pairs by relative path and stem, in the layouts that sets come in.

    images/**/a.jpg and masks/**/a.png     the same path below both folders; a_mask.png and a_gt.png pair with a.jpg
    **/a.jpg and **/a_mask.png             side by side; _mask, _gt..., _label, _seg, or what --mask-suffix says
    images/train, images/val, ...          splits: that of --train and that of --val are read, each from its own folder
    train/images, val/images, ...          the same
    leftImg8bit/<split> and gtFine/<split> Cityscapes
    cat/**/a.jpg, dog/**/b.jpg, ...        of images with a class each: the class is the first folder

Nothing is guessed: an image without a map, a map without an image and two of one name are errors that name the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy"}
SPLIT = re.compile(r"(train|val|test)(?:ing|id|idation)?\d*", re.IGNORECASE)  # train2017, training, valid, ...
#: How the name of a map ends that lies beside its image, and that of an image beside its map.
MAPS = re.compile(
    r"[_-](?:masks?|gt\w*|labels?|labelids|seg|segmentation|annotations?|depth|disparity)$", re.IGNORECASE
)
IMAGES = re.compile(r"[_-](?:sat|img|image|rgb|leftImg8bit)$", re.I)

MORE = {".gif", ".ppm", ".pgm", ".pnm", ".jfif", ".jp2", ".tga"}  # of images with a class each

Files = dict[str, Path]  #: relative path without suffix -> file


def pictures(folder: Path, suffixes: set[str] = SUFFIXES) -> list[Path]:
    """Return the pictures below a folder, sorted; what begins with a dot is not meant (macOS puts ``._name``)."""
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [one for one in folders if not one.startswith(".") and one != "__MACOSX"]
        found += [Path(where) / one for one in files if one[0] != "." and Path(one).suffix.lower() in suffixes]
    return sorted(found)


def holds_pictures(folder: Path) -> bool:
    """Whether a folder is there and has a picture in it or below."""
    return folder.is_dir() and bool(pictures(folder))


# -------------------------------------------------------------------------------------------------------- splits


def split_of(name: str) -> str | None:
    """``train2017`` -> ``train``, ``val`` -> ``validation``; None for a folder that is named after no split."""
    found = SPLIT.fullmatch(name)
    return {"train": "train", "val": "validation", "test": "test"}[found.group(1).lower()] if found else None


def splits(folder: Path) -> dict[str, Path]:
    """Return the splits whose folders lie in this one, {} where it holds anything else, or one of them alone.

    Raises ``ValueError`` where two folders mean one split.
    """
    inside = [one for one in sorted(folder.glob("[!.]*")) if one.is_dir()] if folder.is_dir() else []
    named = [(split_of(one.name), one) for one in inside]
    found = {split: one for split, one in named if split is not None}
    if len(found) < 2 or None in (split for split, _ in named):
        return {}
    if len(found) < len(named):
        raise ValueError(
            f"{folder}: {', '.join(one.name for one in inside)} mean fewer splits: give one folder of them"
        )
    return found


def of_split(folder: Path, split: str) -> Path:
    """Return the folder of this split, or the folder itself where it has none; ``ValueError`` if it lacks it."""
    found = splits(folder)
    if not found:
        return folder
    if split not in found:
        there = ", ".join(one.name for one in found.values())
        raise ValueError(
            f"{folder} has the folders {there} and none of the split {split!r}: name the folder that is meant"
        )
    return found[split]


def has_splits(path: Path) -> bool:
    """Whether one folder holds training and validation."""
    return (path / "leftImg8bit").is_dir() or bool(splits(path) or splits(path / "images"))


# --------------------------------------------------------------------------------------------------------- pairs


def pairs(
    path: Path,
    split: str,
    columns: tuple[str | None, str | None],
    names: tuple[str, ...],
    suffix: str | None = None,
) -> tuple[Files, Files]:
    """Return the images of a folder and their maps, under the same keys.

    Args:
        path: one of the layouts above.
        split: is read where the folder has several.
        columns: names of the folders of images and of maps, where they are not found by themselves.
        names: of the second folder.
        suffix: how the name of a map ends, ``"_mask"``.

    Raises ``ValueError`` where there are none, or some have no partner.
    """
    if (path / "leftImg8bit").is_dir():
        return _cityscapes(path, {"validation": "val"}.get(split, split))
    path = of_split(path, split)
    first, second = path / (columns[0] or "images"), _second(path, columns[1], names)
    if columns[0] and not first.is_dir():
        raise ValueError(f"{path} has no folder {columns[0]!r} (--image-column)")
    ends = MAPS if suffix is None else re.compile(re.escape(suffix) + "$")
    if second is None or not first.is_dir():
        return _beside(first if first.is_dir() else path, ends, names)
    images, maps = (of_split(folder, split) for folder in (first, second))
    found, theirs = by_key(images), pictures(maps)
    if not found:
        raise ValueError(f"{images} holds no images ({', '.join(sorted(SUFFIXES))})")
    return paired(path, found, maps, theirs, ends if suffix is not None else None)


def _second(path: Path, column: str | None, names: tuple[str, ...]) -> Path | None:
    """The folder of maps; None where there is none. Raises ``ValueError`` where there are several."""
    if column is not None:
        if not (path / column).is_dir():
            raise ValueError(f"{path} has no folder {column!r} (--mask-column or --depth-column)")
        return path / column
    there = [path / name for name in dict.fromkeys((*names, "masks")) if (path / name).is_dir()]
    there = [one for one in there if pictures(one)] or there[:1]  # labels/ of YOLO holds texts
    if len(there) > 1:
        said = ", ".join(one.name for one in there)
        raise ValueError(f"{path} has several folders of maps, {said}: choose one with --mask-column {there[0].name}")
    return there[0] if there else None


def by_key(folder: Path) -> Files:
    """Relative path without suffix -> picture. Raises ``ValueError`` for two of one key."""
    found: Files = {}
    for path in pictures(folder):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise ValueError(
                f"{found[key]} and {path.name} have the same stem, which pairs images and masks; take one out"
            )
        found[key] = path
    return found


def paired(
    path: Path, images: Files, folder: Path, maps: list[Path], ends: re.Pattern[str] | None
) -> tuple[Files, Files]:
    """Pair by key; where that leaves some alone, or ``ends`` is given, by the key without the end of the name."""
    if ends is None:
        plain: Files = by_key(folder)
        if plain.keys() == images.keys():
            return images, plain
        short = _short(folder, maps, MAPS, strict=False)
        return both(path, images, short if short.keys() & images.keys() > plain.keys() & images.keys() else plain)
    return both(path, images, _short(folder, maps, ends, strict=True))


def _beside(folder: Path, ends: re.Pattern[str], names: tuple[str, ...]) -> tuple[Files, Files]:
    """``a.jpg`` and ``a_mask.png`` in one folder, or in folders below it."""
    found = pictures(folder)
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    maps = [one for one in found if ends.search(one.stem)]
    if not maps:
        raise ValueError(
            f"{folder} holds {len(found)} pictures and no maps of them: put them into images/ and {names[0]}/ or "
            "masks/ under the same names, or side by side, a.jpg and a_mask.png (another end: --mask-suffix _END)"
        )
    images = {one.relative_to(folder).with_suffix("").as_posix(): one for one in found if not ends.search(one.stem)}
    if len(images) < len(found) - len(maps):
        by_key_of = [one.relative_to(folder).with_suffix("") for one in found if not ends.search(one.stem)]
        twice = next(key for key in by_key_of if by_key_of.count(key) > 1)
        raise ValueError(f"{folder / twice}.*: several images have one name; take one out, or say --mask-suffix")
    return both(folder, images, _short(folder, maps, ends, strict=True))


def _short(folder: Path, maps: list[Path], ends: re.Pattern[str], strict: bool) -> Files:
    """Maps under their names without the end; {} where two become one, or with ``strict`` a ``ValueError``."""
    found: Files = {}
    for path in maps:
        relative = path.relative_to(folder)
        key = relative.with_name(ends.sub("", relative.stem) or relative.stem).as_posix()
        if key in found:
            if not strict:
                return {}
            raise ValueError(
                f"{found[key]} and {path.name} are maps of one image: say how the name of the one that is meant ends, "
                f"--mask-suffix {found[key].stem[len(Path(key).name) :] or '_mask'}"
            )
        found[key] = path
    return found


def both(path: Path, images: Files, maps: Files) -> tuple[Files, Files]:
    """Return them where each has its partner; ``a_sat.jpg`` is the image of ``a_mask.png``, too."""
    if images.keys() != maps.keys():
        shorter = {Path(key).with_name(IMAGES.sub("", Path(key).name)).as_posix(): one for key, one in images.items()}
        images = shorter if shorter.keys() == maps.keys() else images
    lonely = sorted(images.keys() ^ maps.keys())
    if lonely:
        there = images.get(lonely[0], maps.get(lonely[0]))
        raise ValueError(
            f"{path}: {len(lonely)} files have no partner ({len(images)} images, {len(maps)} masks), e.g. {there}: an "
            "image and its mask have the same name (or the mask a_mask, a_gt, see --mask-suffix) in the same folders "
            f"below images/ and masks/, and one of the suffixes {', '.join(sorted(SUFFIXES))}"
        )
    return images, maps


def _cityscapes(path: Path, split: str) -> tuple[Files, Files]:
    """``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` with ``gtFine/.../<name>_gtFine_labelIds.png``."""
    found = {}
    for folder, end in (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelIds.png")):
        found[folder] = {p.name.removesuffix(end): p for p in sorted((path / folder / split).glob(f"*/*{end}"))}
    if not found["leftImg8bit"]:
        raise ValueError(f"{path}/leftImg8bit/{split} holds no <city>/*_leftImg8bit.png")
    return both(path, found["leftImg8bit"], found["gtFine"])


# ------------------------------------------------------------------------------------------------- one class each


def class_folders(path: Path, split: str) -> tuple[list[Path], list[int], list[str]]:
    """Return the pictures of a folder with one folder per class, the class of each, and the names of the classes.

    The class is the first folder, however deep a picture lies in it, and every picture counts, whatever it is called.
    An empty folder is a class without pictures. Raises ``ValueError`` for pictures in no class and for less than two
    classes.
    """
    path = of_split(path, split)
    folders = sorted(one for one in path.glob("[!.]*") if one.is_dir() and one.name != "__MACOSX")
    found = [(one, k) for k, folder in enumerate(folders) for one in pictures(folder, SUFFIXES | MORE)]
    stray = next((one for one in pictures(path, SUFFIXES | MORE) if one.parent == path), None)
    if stray is not None and folders:
        raise ValueError(
            f"{stray} lies in no folder of a class ({', '.join(f.name for f in folders[:5])}, ...); move it"
        )
    if len(folders) < 2 or not found:
        raise ValueError(
            f"{path} has {len(found)} rows of images and not two folders of them: a folder holds one folder per class, "
            f"at least two, e.g. {path}/cat and {path}/dog"
        )
    return [one for one, _ in found], [k for _, k in found], [one.name for one in folders]
