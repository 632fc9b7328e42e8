"""The command line: a click group that imports a command's module only when it is called, and maps errors to exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from .version import __version__

COMMANDS = {
    "convert": "Pack a Hugging Face checkpoint into one file.",
    "inspect": "Show what a packed file holds and how it is laid out.",
    "diff": "Compare two packed files tensor by tensor.",
    "verify": "Check a packed file's checksums, or every bit against its checkpoint.",
    "unpack": "Write the checkpoint back out of a packed file.",
    "generate": "Generate text from a packed file.",
    "bench": "Time loading, prefill and decode on the GPU.",
    "serve": "Serve a packed file to OpenAI clients.",
}

EXIT_CODES = """\b
Exit codes:
  0  done
  1  a check found a difference or corruption
  2  wrong usage
  3  invalid or hostile input
  4  unsupported version, feature or architecture
  5  the operating system refused to read or write"""


class LazyGroup(click.Group):
    """A group whose help needs no command to be imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"megalith.commands.{name}")
        command = getattr(module, name)
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **keywords)  # prints --help and --version
        except BrokenPipeError:
            _drop_output()
            raise click.exceptions.Exit(0) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # whoever reads has seen enough; click would exit with 1, which means "different" here
            _drop_output()
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megalith", message="%(prog)s %(version)s")
def group() -> None:
    """Pack a Hugging Face checkpoint into one file whose bytes lie in the order GPU kernels read them, and run that file.

    Data goes to standard output, progress and messages to standard error.
    """


def _drop_output() -> None:
    """What is still buffered cannot be written either, and would raise again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code instead of exiting."""
    from megalith.format.errors import FileError, MegalithError

    try:
        result = group.main(args=arguments, prog_name="megalith", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except MegalithError as error:
        click.echo(f"megalith: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OSError as error:  # files raise FileError: this is the output
        _drop_output()
        click.echo(f"megalith: {FileError.wrap(error.filename or 'standard output', error)}", err=True)
        return FileError.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("megalith: interrupted", err=True)
        return 130


if __name__ == "__main__":
    main()
