"""The command line: ``adaptkit COMMAND ...``, one file of this folder for each command.

A command is a module with two functions, found by its place in this folder::

    def add(commands):            # commands: what argparse's add_subparsers() returned
        parser = commands.add_parser("name", help="what it is for")
        parser.add_argument(...)

    def run(args):                # the parsed arguments; returns nothing, or the exit status
        ...

The module imports what is heavy (torch, rich, the package itself) inside ``run``: every command's ``add`` is called for
``adaptkit --help``, which should be there at once. An error of the user's is raised as ``ValueError``, ``TypeError``,
``OSError`` or ``ImportError`` and becomes one line. Files whose name starts with ``_`` are no commands.
"""

from adaptkit.cli._main import main

__all__ = ["main"]
