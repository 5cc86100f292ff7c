"""Seeded metadata and README.md files as the world has them: every type that JSON and YAML can say, and some abuse."""

from __future__ import annotations

import random
from typing import Any

from adaptkit.hub.card import BEGIN, END

TEXTS = [
    "", " ", "a", "ade20k", "yes", "null", "1.0", "a: b", "- x", "#c", "{x}", "'", '"', "*a", "&a", "!!int", "---", "...",
    "a\n---\nb", "\n", "\t", "\r\n", "é", "漢字", "\u2028", "\u202e", "\ufeff", "\x85", "\x1b[31m", "\ud800", "a\udfffb",
    "x" * 300, "word " * 60, "```", "|", "<b>", "<!--", "-->", BEGIN, END, f"{END}\n{BEGIN}", "[x](y)", "2020-01-01", "=", "<<", "~",
]  # fmt: skip
NUMBERS = [0, 1, -1, 0.5, 1e300, 10**400, -(10**19), float("nan"), float("inf"), True, False]
KEYS = [
    "task", "license", "license_name", "license_link", "dataset", "datasets", "metrics", "tags", "model-index",
    "base_model", "library_name", "pipeline_tag", "language",
]  # fmt: skip
TASKS = ["depth", "segmentation", "semantic-segmentation", "nothing"]
#: values of YAML that its loader turns into something else, or breaks on
YAML = [
    "2020-01-01", "2020-13-45", "2001-12-14t21:59:43.10-05:00", "0o17", "0x1F", "1_000", "190:20:30", ".nan", "-.inf", "1e5", "1.5e+300",
    "9" * 30, "9" * 5000, "~", "yes", "on", "=", "!!binary aGk=", "!!binary '*'", "!!timestamp x", "!!int x", "!!int ''", "!!float ''",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "!!str 1", "!mine x", "!!python/object:os.system x", "&a [*a]", "*b", "[a, [b]]",
    "{a: {b: c}}", "[{a: 1}, {a: 1}]", "{[a]: b}", "|\n  x\n  ---\n  y", ">-\n  folded\n  text", "'\\ud800'", '"\\ud800"', '"\\x1b[1m"',
    '"\\u202e"', '"\\x00"', "a: b: c", "[", "{", "@x", "\t", "- x\n- y", "[1, true, 1.0, yes, '1']", "&x {a: 1}\nother: *x", "[" * 2000,
]  # fmt: skip
BODIES = [
    "", "text", "text\n", "\n\n  text", "---", "---\nmore: yes\n---\ntext", "# title\n\nwords\n", BEGIN, END, f"{BEGIN}\nold\n{END}",
    f"a\n{BEGIN}\nold\n{END}\nb", f"{END}\n{BEGIN}\nold\n{END}", f"{BEGIN}{BEGIN}{END}{END}", f"{BEGIN}\n1\n{END}\n{BEGIN}\n2\n{END}\n",
    "\r\nwindows\r\n", "\u2028x", "\ufefftext", "tail   \n\n\n",
]  # fmt: skip


def value(g: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold."""
    kind = g.randrange(6 if depth < 3 else 3)
    if kind == 0:
        return g.choice(TEXTS)
    if kind == 1:
        return g.choice(NUMBERS)
    if kind == 2:
        return g.choice([None, "".join(chr(g.randrange(1, 0x3000)) for _ in range(g.randrange(8)))])
    if kind == 3:
        return [value(g, depth + 1) for _ in range(g.randrange(4))]
    return {g.choice([*KEYS, *TEXTS]): value(g, depth + 1) for _ in range(g.randrange(4))}


def metadata(g: random.Random) -> dict[str, Any]:
    """What a header may hold, often with what a card can use."""
    found = {g.choice([*KEYS, *TEXTS]): value(g) for _ in range(g.randrange(6))}
    if g.random() < 0.5:
        found |= {"task": g.choice(TASKS), "dataset": g.choice([g.choice(TEXTS), value(g)])}
        found["metrics"] = {g.choice(TEXTS): g.choice([*NUMBERS, value(g)]) for _ in range(g.randrange(1, 4))}
    return found


def readme(g: random.Random) -> str:
    """A README.md that somebody wrote: front matter, if any, and text, with our marks or without."""
    body = "".join(g.choice(BODIES) for _ in range(g.randrange(1, 3)))
    if g.random() < 0.2:
        return body
    said = "".join(f"{g.choice(KEYS)}: {g.choice(YAML)}\n" for _ in range(g.randrange(4)))
    return g.choice(["", "\ufeff", "\n"]) + f"---\n{said}---{g.choice(['', chr(10), '  ' + chr(10)])}{body}"
