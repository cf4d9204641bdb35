"""`python -m nestling` is the `nestling` command."""

from nestling.cli.main import app

if __name__ == "__main__":
    app(prog_name="nestling")
