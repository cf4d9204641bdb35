"""What the commands share: errors as one clear line, JSON output, `NAME=VALUE` options."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import typer


def friendly(function: Callable) -> Callable:
    """The command with bad input reported as one line and exit code 2 (1 for a failing system), instead of a traceback.

    With `--json` the error is also an object on stdout. NESTLING_DEBUG=1 shows the traceback.
    """

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            if os.environ.get("NESTLING_DEBUG"):
                raise
            message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if isinstance(error, OSError) and error.filename:
                message = f"{message}: {error.filename}"
            if kwargs.get("as_json"):
                print_json({"error": message})
            typer.secho(f"error: {message}", fg="red", err=True)
            raise typer.Exit(1 if isinstance(error, OSError) else 2) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None

    command.__signature__ = inspect.signature(function, eval_str=True)
    return command


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(values, default=str) + "\n")
    sys.stdout.flush()


def assignments(items: list[str], option: str) -> dict[str, Any]:
    """`NAME=VALUE` options as a dictionary; a value is read as JSON where it is JSON, else as text."""
    values = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign or not name:
            raise ValueError(f"{option} takes NAME=VALUE, not {item!r}")
        values[name.strip()] = parse_value(text)
    return values


def nested(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`base` changed by values whose dotted names reach into dictionaries: `{"mixer_options.chunk_size": 32}`."""
    result = copy.deepcopy(base)
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name!r} reaches into {parent!r}, which is {inner!r}")
        inner[last] = value
    return result


def parse_value(text: str) -> Any:
    """A value from the command line: JSON, Python's True/False/None, else text."""
    names = {"True": True, "False": False, "None": None}
    if text in names:
        return names[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def json_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The JSON object an option was given, None where it was not."""
    if text is None:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} must be a JSON object, not {text!r}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{option} must be a JSON object, not {text!r}")
    return values
