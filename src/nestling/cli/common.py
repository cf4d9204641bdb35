"""What the commands share: errors as one clear line, JSON output, `NAME=VALUE` options, paths and texts as given."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from nestling.utils.places import expand, file_to_write, folder_to_write


class App(typer.Typer):
    """A command line whose output never fails for a character that a terminal, a file or a pipe cannot hold."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by whoever started this process
                setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115 - for good
        sys.stdin.reconfigure(errors="surrogateescape")  # `readable` says what is wrong with it
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")
        return super().__call__(*args, **kwargs)


def friendly(function: Callable) -> Callable:
    """The command with bad input reported as one line and exit code 2 (1 for a failing system), instead of a traceback.

    With `--json` the error is also an object on stdout. A reader that has gone (`| head -1`) ends the command quietly.
    NESTLING_DEBUG=1 shows the traceback.
    """

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            _drop_output()
            raise typer.Exit(1) from None
        except Exception as error:
            if hasattr(error, "exit_code") or os.environ.get("NESTLING_DEBUG"):  # typer's own, or wanted whole
                raise
            message = said(error)
            with contextlib.suppress(OSError):
                if kwargs.get("as_json"):
                    print_json({"error": message})
                sys.stdout.flush()
            _drop_output()
            typer.secho(f"error: {message}", fg="red", err=True)
            raise typer.Exit(2 if isinstance(error, ValueError | TypeError) else 1) from None

    command.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return command


def said(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError):
        message = error.strerror or str(error)
        return f"{message}: {error.filename}" if error.filename else message
    if isinstance(error, ValueError | TypeError):
        return str(error)
    return f"{type(error).__name__}: {error} (a fault of nestling or of this machine: NESTLING_DEBUG=1 shows where)"


def _drop_output() -> None:
    """Let what could not be written go: the interpreter would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(values, default=str) + "\n")
    sys.stdout.flush()


def readable(text: str, what: str) -> str:
    """A text from the command line or a terminal, in whatever encoding that is set to.

    Raises:
        ValueError: it is no UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # bytes that did not fit the terminal's encoding came as surrogates
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise ValueError(f"{what} is no UTF-8 text: {text!a}") from None


def _parser(check: Callable[[str | Path], Path]) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        try:
            return check(text)
        except (ValueError, OSError) as error:  # OSError: a name too long for the system, say
            raise typer.BadParameter(said(error)) from None

    return path


# how an option or argument that is a path is read: `typer.Option(parser=...)`
a_path, a_file, a_folder = (_parser(check) for check in (expand, file_to_write, folder_to_write))


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
