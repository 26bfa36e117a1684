"""The `abyssal` command: verbs, and the one place where errors become exit codes.

Exit codes: 0, 1 the work failed, 2 bad input, 130 interrupted. Errors are one line on stderr.
"""

from __future__ import annotations

import sys

import typer

from abyssal import __version__
from abyssal.base.errors import AbyssalError, InputError
from abyssal.cli.cache import cache
from abyssal.cli.chat import chat
from abyssal.cli.convert import convert
from abyssal.cli.doctor import doctor
from abyssal.cli.encode import encode, parse
from abyssal.cli.generate import generate
from abyssal.cli.inspect import inspect
from abyssal.cli.logits import logits
from abyssal.cli.make_release import make_release
from abyssal.cli.sandbox import sandbox
from abyssal.cli.serve import serve
from abyssal.cli.train import train

app = typer.Typer(
    help="DeepSeek-V4 in Python: run, read and convert its models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (inspect, generate, chat, serve, logits, encode, parse, make_release, convert, doctor):
    app.command()(verb)
app.add_typer(cache, name="cache")
app.add_typer(train, name="train")
app.add_typer(sandbox, name="sandbox")


def _version(show: bool) -> None:
    if show:
        print(f"abyssal {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the verb."""


def main() -> None:
    """Run a verb and exit."""
    try:
        app()
    except AbyssalError as error:
        print(f"abyssal: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe left
        sys.stderr.close()
        sys.exit(1)
