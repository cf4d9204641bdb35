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


def test_help_needs_nothing_heavy():
    code = (
        "import sys; sys.argv[0] = '/bin/nestling'; import nestling.cli.main; "
        "heavy = ('torch', 'transformers', 'numpy', 'datasets', 'nestling.training'); "
        "print([n for n in sys.modules if n.startswith(heavy)])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_elsewhere_importing_the_package_registers_its_models():
    code = (
        "import nestling; from transformers import AutoConfig; "
        "print(AutoConfig.for_model('hope', vocab_size=300).vocab_size, nestling.HopeConfig.model_type)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["300", "hope"]
