"""The command `sammed3d`: weights files, fine-tuned networks and the promptable model from a shell.

One pair of functions per command, in the module of its subject: `add_...` declares its arguments,
`_run_...` does it and returns the exit code. 0 is success, 1 is a check that failed, 2 is a command
that could not run.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sammed3d_backbone import console
from sammed3d_backbone.cli import (
    clicks,
    curation,
    models,
    planning,
    prompts,
    selftest,
    serve,
    weights,
)

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS = (
    weights.add_info,
    weights.add_convert,
    weights.add_verify,
    planning.add_plan,
    planning.add_train,
    planning.add_recipe,
    models.add_predict,
    models.add_push,
    models.add_export,
    clicks.add_clicks,
    curation.add_curate,
    prompts.add_segment,
    prompts.add_features,
    serve.add_serve,
    serve.add_view,
    selftest.add_selftest,
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and the line on standard error."""
        self.exit(2, f"{self.prog}: error: {console.shortened(message)}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    return console.run_program(lambda: _run(argv), "sammed3d")


def _run(argv: Sequence[str] | None) -> int:
    """Reads the arguments and runs their command."""
    parser: argparse.ArgumentParser = Parser(
        prog="sammed3d", description="SAM-Med3D as a backbone and as a promptable model."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:  # argparse puts those behind an option into the rest
        args.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="sammed3d: %(message)s")
    for name, value in vars(args).items():
        if isinstance(value, Path):  # a shell leaves ~ as it is in quotes and behind --option=
            setattr(args, name, Path(os.path.expanduser(value)))  # noqa: PTH111 (raises nothing)
    code: int = args.run(args)
    return code
