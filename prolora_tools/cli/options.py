"""Option types and option groups that several commands share."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound=Callable[..., Any])

DTYPES = click.Choice(["float64", "float32", "float16", "bfloat16"])


_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _scaled(value: str, units: dict[str, int], what: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if not match or match[2] not in units:
        raise click.BadParameter(f"{value!r} is not {what}")
    return round(Decimal(match[1]) * units[match[2]])


def count(value: str) -> int:
    """5M -> 5,000,000; an option's type."""
    return _scaled(value, _COUNT_UNITS, "a count such as 5M")


def size(value: str) -> int:
    """5GB -> 5,000,000,000 bytes; an option's type."""
    return _scaled(value, _SIZE_UNITS, "a size such as 5GB")


def chunks(value: str) -> tuple[int, int]:
    """M or M,N -> (m, n); an option's type."""
    match = re.fullmatch(r"(\d+)(?:,(\d+))?", value.strip())
    if not match:
        raise click.BadParameter(f"{value!r} is not M or M,N, such as 7 or 4,2")
    return int(match[1]), int(match[2] or match[1])


def strides(value: str) -> Any:
    """S_A,S_B or one of two words; an option's type."""
    text = value.strip()
    if text in {"official", "free"}:
        return text
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise click.BadParameter(f"{value!r} is not S_A,S_B such as 4,2, nor official or free")
    return int(match[1]), int(match[2])


def shown(command: F) -> F:
    """--json and --quiet."""
    command = click.option("--quiet", "-q", is_flag=True, help="Print no progress and no notes.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")(command)


def grouped(command: F) -> F:
    """--by, as `view`."""
    return click.option(
        "--by",
        "view",
        type=click.Choice(["type", "layer", "module"]),
        default="type",
        show_default=True,
        help="Group the table of one geometry. --json has all of them.",
    )(command)


def written(command: F) -> F:
    """-o, --overwrite and --dry-run."""
    command = click.option("--dry-run", is_flag=True, help="Read headers only, write nothing, report the same.")(
        command
    )
    command = click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a model folder.")(command)
    return click.option("-o", "--output", "out", required=True, metavar="OUT", help="Folder to write.")(command)
