"""Which adapter fits which backbone, found out by attaching.

``python tests/fits.py`` prints README's table; then the same for every other vision tower, what to hand over of a model
around one, and why some towers are refused.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from containers import HELD, REFUSED
from families import HOSTS
from towers import OPTIONS, TOWERS

import adaptkit
from adaptkit.core import registry

START, STOP = "<!-- fits:start -->", "<!-- fits:stop -->"


def hierarchical():
    """Tiny hosts of several stages."""
    from timm.models.metaformer import MetaFormer
    from timm.models.swin_transformer import SwinTransformer

    from adaptkit.models import DAT

    yield MetaFormer(dims=(16, 24, 32, 64), depths=(1, 1, 2, 1), num_classes=5)
    yield SwinTransformer(64, window_size=4, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=5)
    sizes = {"dim_stem": 8, "dims": (16, 24, 32, 64), "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4)}
    yield DAT(**sizes, img_size=64, num_classes=5, window_sizes=(4, 3, 2, 2), groups=(-1, -1, 2, 2))


def fits(adapter, host):
    """Whether it attaches."""
    try:
        adaptkit.attach(host, (adapter, OPTIONS.get(adapter, {}))).detach()
    except TypeError:
        return False
    return True


def classes():
    """Hosts by library and class, in the order of the table."""
    hosts = [registry.view(host.build()).backbone for _, host in sorted(HOSTS.items())] + list(hierarchical())
    by_class = {}
    for host in hosts:
        by_class.setdefault((type(host).__module__.partition(".")[0], type(host).__name__), []).append(host)
    return dict(sorted(by_class.items()))


def rows():
    """For each class of host its adapters, in the order of the table."""
    names = [name for name in adaptkit.list_adapters() if "toy" not in name]
    for (library, cls), group in classes().items():
        yield library, cls, {name: [fits(name, host) for host in group] for name in names}


def table():
    """Markdown."""
    found = list(rows())
    names = list(found[0][2])
    lines = ["| | " + " | ".join(f"`{n}`" for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for library, cls, row in found:
        cells = ["yes" if all(row[n]) else "some" if any(row[n]) else "" for n in names]
        lines.append(f"| {library} {cls} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(adapter, host):
    """As in the table; "named" where LoRA asks which layers."""
    try:
        return "yes" if fits(adapter, host) else ""
    except ValueError as error:
        if "target_modules=" not in str(error):
            raise
        return "named"


def towers():
    """Markdown: every tower of ``towers.py``, with the family that sees it."""
    names = [name for name in adaptkit.list_adapters() if "toy" not in name]
    lines = ["| | family | " + " | ".join(f"`{n}`" for n in names) + " |", "|---" * (len(names) + 2) + "|"]
    for name, tower in TOWERS.items():
        host = tower.build()
        title = name if name.startswith(tower.library) or tower.library == "torch.hub" else f"{tower.library} {name}"
        cells = [registry.view(host).spec.family, *(cell(n, host) for n in names)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def others():
    """Markdown: what the error says of models around a tower, and of towers of other blocks."""
    lines = ["| transformers | what `attach` says |", "|---|---|"]
    for name, (build, _) in {**HELD, **REFUSED}.items():
        try:
            adaptkit.attach(build(), "sfp")
        except TypeError as error:
            lines.append(f"| {name} | {error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), towers(), others(), sep="\n\n")
