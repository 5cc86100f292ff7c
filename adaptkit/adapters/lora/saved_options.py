"""What of peft's options a file may say: of the types that peft's own configs annotate, of sizes that a layer can have.

peft runs some of them as regular expressions, so that a file must not say just any.
"""

from __future__ import annotations

from typing import Any

from adaptkit.core.schema import check, check_pattern, fields_of

__all__ = ["check_patterns", "check_types"]

MOST = 1 << 16  #: of a rank, a block, a number of layers
MOST_NAMES, MOST_PATTERNS = 4096, 512  #: names of layers; regular expressions, of which Python keeps so many compiled
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")  #: regular expressions, where they are texts
#: Values by regular expressions; peft says ``dict``.
NAMED: dict[str, Any] = {"rank_pattern": dict[str, int], "alpha_pattern": dict[str, float]}
SCALES = ("lora_alpha", "alpha")  #: peft says ``int`` and takes any number


def check_types(kind: Any, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an option whose value is none of its type, ``kind`` being peft's config class."""
    hints, _ = fields_of(kind)
    for option, value in options.items():
        check(value, float if option in SCALES else hints.get(option, Any), option)
        if option in NAMED and value is not None:
            check(value, NAMED[option], option)
        most = MOST_PATTERNS if option in NAMED else MOST_NAMES
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"{option}: found {len(value)} of them, expected at most {most}")
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if type(number) is int and not abs(number) <= MOST:
                where = f"{option}.{name}" if name else option
                raise ValueError(f"{where}: found {number}, expected at most {MOST}")


def check_patterns(options: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a regular expression that may take too long; see :func:`check_pattern`."""
    for option in PATTERNS:
        if isinstance(options.get(option), str):
            check_pattern(options[option], option)
    for option in NAMED:
        for pattern in options.get(option) or ():
            check_pattern(pattern, option)
