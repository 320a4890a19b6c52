"""The command line: parses, prints, chooses exit codes."""

from kdtrain.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
