"""The group `hipp recover`: its command `train` is what runs without a command's name."""

import copy
from typing import Any

import typer
from typer.core import TyperGroup

from hipp_ext.cli.recover import recover_app
from hipp_ext.cli.recover_precompute import precompute_app

DEFAULT = "train"


class DefaultGroup(TyperGroup):
    """A group whose arguments are those of `DEFAULT` unless they begin with a command's name.

    Its help is that of `DEFAULT`, with the other commands below.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        shown, default = copy.copy(self), self.commands[DEFAULT]
        shown.params, shown.help = default.params, default.help
        shown.commands = {name: c for name, c in self.commands.items() if c is not default}
        TyperGroup.format_help(shown, ctx, formatter)


recover_group = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    short_help="Fine-tune a pruned model, by its data or by the dense model.",
)
recover_group.add_typer(recover_app)
recover_group.add_typer(precompute_app)
