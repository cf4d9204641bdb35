import subprocess
import sys

import pytest

from nestling.cli.main import COMMANDS
from nestling.version import __version__


def test_help_lists_every_command(call):
    result = call("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_teaches_and_speaks_json(call, name):
    result = call(name, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"nestling {name}" in result.stdout
    assert "--json" in result.stdout


def test_unknown_names_are_refused_with_a_suggestion(call):
    result = call("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'" in result.stderr
    result = call("train", "--step", "3")
    assert result.exit_code == 2
    assert "--steps" in result.stderr


def test_version(call):
    assert call("--version").stdout.strip() == f"nestling {__version__}"


def test_heavy_imports_stay_inside_the_commands():
    code = (
        "import sys, nestling; before = set(sys.modules); import nestling.cli.main; "
        "new = set(sys.modules) - before; heavy = ('torch', 'transformers', 'numpy', 'datasets', 'nestling.training'); "
        "print([n for n in new if n.startswith(heavy)])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
