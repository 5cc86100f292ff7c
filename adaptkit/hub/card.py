"""The model card of a saved adapter, written from its header, and merged with the card that a person edited.

The part of the text that this module writes stands between two marks. A new card replaces what is between them and
keeps every other line; of the front matter it replaces the keys that it knows and keeps the others.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from adaptkit.core.near import hint, looks_like_path
from adaptkit.core.printable import printable
from adaptkit.core.warned import warn
from adaptkit.version import DISTRIBUTION

__all__ = ["card_beside", "check_metadata", "is_hub_id", "merged", "model_card", "renewed"]

BEGIN = "<!-- adaptkit: written by push, and again by the next one. Your own words are kept above and below. -->"
END = "<!-- adaptkit: end -->"
FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)

#: what a model does, as users say it -> the Hub's pipeline tag
TASKS = {
    "classification": "image-classification",
    "depth": "depth-estimation",
    "depth-estimation": "depth-estimation",
    "detection": "object-detection",
    "feature-extraction": "image-feature-extraction",
    "image-classification": "image-classification",
    "image-feature-extraction": "image-feature-extraction",
    "image-segmentation": "image-segmentation",
    "instance-segmentation": "image-segmentation",
    "keypoint-detection": "keypoint-detection",
    "object-detection": "object-detection",
    "panoptic-segmentation": "image-segmentation",
    "segmentation": "image-segmentation",
    "semantic-segmentation": "image-segmentation",
}


def is_hub_id(name: Any) -> bool:
    """Whether this is a string of the form ``"org/name"``: one slash, and nothing that can only be a path."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not looks_like_path(name)


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a card could not say what the metadata says: before anything is uploaded."""
    task, metrics = metadata.get("task"), metadata.get("metrics")
    if task is not None and str(task) not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise ValueError(f"task={task!r} is none that the Hub knows{hint(task, TASKS)}; choose one of {known}")
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        raise ValueError("license='other' needs license_name=, and license_link= where its text is somewhere")
    if metrics is None:
        return
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"metrics={metrics!r} is no dict of values; give metrics={{'mIoU': 0.43}}")
    if task is None or not _results(metadata):
        raise ValueError(
            "metrics are reported on a task and a data set: give task= and dataset= beside metrics={'mIoU': 0.43}, or "
            "metrics={'ade20k': {'mIoU': 0.43}, ...} for several data sets"
        )


def model_card(header: dict[str, Any], repo_id: str = "") -> str:
    """Return the card: front matter that links adapter and backbone, and a snippet that runs.

    Args:
        header: of the adapter file. Its ``metadata``, as :func:`adaptkit.hub.metadata.plain` returns them, may hold
            ``task``, ``license`` (with ``license_name`` and ``license_link``), ``dataset`` (a name or several) and
            ``metrics``; what the card cannot use is left out.
        repo_id: where it will be found; empty for a folder.
    """
    text = _text(header, repo_id).replace("<!--", "<!- -")  # a mark among the names would end our part
    return f"---\n{_dumped(_front(header, repo_id))}---\n\n{BEGIN}\n{text}\n{END}\n"


def card_beside(folder: str | os.PathLike[str], header: dict[str, Any]) -> str | None:
    """Return the card to write into ``folder``; None where the README.md that is there is to be kept as it is.

    One without our marks is somebody else's. One with them keeps the words around them, as :func:`merged` says; where
    that cannot be done, a warning says why, for no card is worth the trained weights.
    """
    card, path = model_card(header), Path(folder).expanduser() / "README.md"
    if not path.exists() and not path.is_symlink():
        return card
    try:
        old = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if BEGIN not in old:
        return None
    try:
        return renewed(card, old, str(path), header.get("metadata", {}))
    except ValueError as error:
        warn(f"{path} is kept as it is: {error}, and save again")
        return None


def renewed(card: str, old: str, where: str, metadata: dict[str, Any]) -> str:
    """Return :func:`merged`, with a warning where the old card reports results and the new one has none."""
    if "model-index" in _split(old)[0] and not metadata.get("metrics"):
        warn(
            f"the card of {where} reports results of what was there before, and they stay: give metrics= to "
            "replace them, or take them out there",
        )
    return merged(card, old)


def merged(card: str, old: str) -> str:
    """Return ``card`` with what a person wrote into ``old``: other keys of the front matter, text around the marks.

    ``ValueError`` where the old front matter is no YAML, or the second mark is gone.
    """
    (new_front, new_text), (old_front, old_text) = _split(card), _split(old)
    if BEGIN in old_text and END not in old_text.partition(BEGIN)[2]:
        raise ValueError(
            f"the README.md that is there has the mark {BEGIN!r} and not the one that ends it, {END!r}: put it back "
            "where your own words begin again"
        )
    # Somebody's tag may be anything, and 1, 1.0 and true are three.
    tags = {repr(tag): tag for tag in (*_listed(old_front.get("tags")), *_listed(new_front.get("tags")))}
    front = {**old_front, **new_front, "tags": list(tags.values())}
    before, begin, rest = old_text.partition(BEGIN)
    if begin:
        text = before + new_text.strip() + rest.partition(END)[2]
    else:
        text = "\n\n".join(part for part in (old_text.rstrip(), new_text.strip()) if part) + "\n"
    return f"---\n{_dumped(front)}---\n\n{text.lstrip()}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text after it."""
    import yaml

    card = card.removeprefix("\ufeff")  # some editors write one, and YAML wants none before the dashes
    match = FRONT.match(card)
    if match is None:
        return {}, card
    try:
        front = yaml.safe_load(match[1]) or {}
    except Exception as error:  # YAMLError, or what a constructor ran into: a tag promises more than its text holds
        raise ValueError(f"the front matter of the README.md that is there is no YAML: {error}. Mend it") from error
    if not isinstance(front, dict):
        raise ValueError(f"the front matter of the README.md that is there is {front!r}, not keys and values. Mend it")
    return front, card[match.end() :]


def _dumped(front: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes a ``!!set`` in one order: Python's own changes from process to process."""

    def ordered(dumper: Any, value: set[Any]) -> Any:
        return dumper.represent_mapping("tag:yaml.org,2002:set", dict.fromkeys(sorted(value, key=repr)))

    Dumper.add_representer(set, ordered)
    try:
        return str(yaml.dump(front, Dumper=Dumper, sort_keys=False, allow_unicode=True))
    except RecursionError as error:
        raise ValueError(
            "the front matter of the README.md that is there is nested too deeply to be written. Mend it"
        ) from error


def _listed(value: Any) -> list[Any]:
    """One thing or several -> a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _datasets(metadata: dict[str, Any]) -> list[str]:
    return [str(d) for d in (*_listed(metadata.get("dataset")), *_listed(metadata.get("datasets")))]


def _results(metadata: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by data set, those that are numbers; {} where it is not said on which one they were measured."""
    metrics, datasets = metadata.get("metrics"), _datasets(metadata)
    if not isinstance(metrics, dict):
        return {}
    if not all(isinstance(values, dict) for values in metrics.values()):
        metrics = {datasets[0]: metrics} if len(datasets) == 1 else {}
    numbers = {d: {k: v for k, v in values.items() if _is_number(v)} for d, values in metrics.items()}
    return {dataset: values for dataset, values in numbers.items() if values}


def _is_number(value: Any) -> bool:
    """Whether this is a number that a card can report: a finite one, which fits into a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _front(header: dict[str, Any], repo_id: str) -> dict[str, Any]:
    metadata, names = header.get("metadata", {}), [a["name"] for a in header["adapters"]]
    base = header["backbone"]["source"]
    task = TASKS.get(str(metadata.get("task")), "")
    front: dict[str, Any] = {"library_name": "adaptkit"}
    tags = ["adaptkit", *names]
    if is_hub_id(base):
        front |= {"base_model": base, "base_model_relation": "adapter"}
        tags.append(f"base_model:adapter:{base}")
    if task:
        front["pipeline_tag"] = task
    front["tags"] = tags
    front |= {k: str(metadata[k]) for k in ("license", "license_name", "license_link") if metadata.get(k)}
    results = _results(metadata)
    if _datasets(metadata) or results:
        front["datasets"] = list(dict.fromkeys([*_datasets(metadata), *results]))
    if task and results:
        front["metrics"] = sorted({name for values in results.values() for name in values})
        front["model-index"] = [{"name": repo_id or _title(header), "results": _index(task, results)}]
    return front


def _index(task: str, results: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """As the Hub reads results: one entry for each data set."""
    return [
        {
            "task": {"type": task},
            "dataset": {"type": dataset, "name": dataset},
            "metrics": [{"type": name, "name": name, "value": float(value)} for name, value in values.items()],
        }
        for dataset, values in results.items()
    ]


def _title(header: dict[str, Any]) -> str:
    backbone = header["backbone"]
    return (
        f"{' + '.join(a['name'] for a in header['adapters']) or 'head'} for {backbone['source'] or backbone['class']}"
    )


def _text(header: dict[str, Any], repo_id: str) -> str:
    backbone = header["backbone"]
    spec = ", ".join(f"{name} {value}" for name, value in backbone["spec"].items() if name != "family")
    parts = [
        f"# {_inline(_title(header))}",
        f"Trained with adaptkit (`pip install {DISTRIBUTION}`) beside a frozen backbone: {_inline(spec)}. The backbone "
        f"is not in this file; its class is `{_inline(backbone['class'])}`.",
        f"```python\n{_snippet(header, repo_id or 'path/to/this/folder')}```",
    ]
    results = _results(header.get("metadata", {}))
    if results:
        cells = [(d, name, value) for d, values in results.items() for name, value in values.items()]
        rows = [f"| {_inline(d)} | {_inline(name)} | {value} |" for d, name, value in cells]
        parts.append("\n".join(["| data set | metric | value |", "|---|---|---|", *rows]))
    config = {"adapters": header["adapters"], "head": header["head"]}
    parts.append(f"```json\n{json.dumps(config, indent=2)}\n```")
    return "\n\n".join(parts)


def _inline(text: object) -> str:
    """Text of a file inside of a line of Markdown: no line, cell, code or tag of its own."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")


def _snippet(header: dict[str, Any], where: str) -> str:
    backbone, head, where = header["backbone"], header["head"], printable(where)
    kind = printable(backbone["class"])
    if head is not None and head.get("around"):
        return _network_snippet(printable(backbone["source"]) or kind, printable(head["class"]), where)
    given = ", head=head" if head is not None and head["name"] is None else ""
    lines = ["import torch", "", "import adaptkit", ""]
    if given:
        lines.append(f"head = ...  # the {printable(head['class'])} that it was trained with, built by you")
    if backbone["source"]:
        lines.append(f'model = adaptkit.from_pretrained("{where}"{given})  # backbone, adapter and head, in eval mode')
    else:
        lines.append(f"backbone = ...  # the {kind} that it was trained on, built by you")
        lines.append(f'model = adaptkit.attach(backbone, "{where}"{given})')
    side = 16 * backbone["spec"]["patch_size"] if "patch_size" in backbone["spec"] else 224
    channels = backbone["spec"].get("channels", 3)
    colours = "RGB" if channels == 3 else f"{channels} channels"
    lines.append(f"image = torch.rand(1, {channels}, {side}, {side})  # {colours} between 0 and 1, any size")
    if backbone["mean"]:
        lines.append(f"mean, std = torch.tensor({backbone['mean']}), torch.tensor({backbone['std']})")
        lines.append("image = (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)")
    else:
        lines[-1] += ", normalised as for the backbone"
    lines.append(
        textwrap.dedent(
            """
            with torch.no_grad():
                features = model(image)
            print(features.tokens.shape, [m.shape for m in features.maps])
            for logits in features.logits if isinstance(features.logits, tuple) else [features.logits]:
                if isinstance(logits, torch.Tensor):
                    print(logits.shape)
            """
        ).strip("\n")
    )
    return "\n".join(lines) + "\n"


def _network_snippet(backbone: str, network: str, where: str) -> str:
    """For a detector or segmenter of another library around the adapter's pyramid."""
    return f"""import adaptkit

file = adaptkit.load("{where}")
backbone = ...  # {backbone}, built by you
adapters = [(a["name"], a["config"]) for a in file.header["adapters"]]
pyramid = adaptkit.as_pyramid(adaptkit.attach(backbone, *adapters))  # with the strides, names and out= of its maker
network = ...  # the {network} that it was trained in, built by you around the pyramid
pyramid.load("{where}", network)
network.eval()
"""
