"""Commands about a recipe and its teacher, before anything is run."""

from pathlib import Path
from typing import Annotated

import typer

from bakery.commands.options import Debug, RecipeFile, Sets, overrides


def probe_command(config: RecipeFile, set_: Sets = None, debug: Debug = False) -> None:
    """Ask a served teacher what it can do, and check that its log-probs stand where they should."""
    from bakery.config import load_recipe
    from bakery.reports.probe_table import print_capabilities
    from bakery.teachers.opening import probe_teacher

    teacher = load_recipe(config, overrides({}, set_)).section("teacher")
    raise typer.Exit(0 if print_capabilities(teacher, probe_teacher(teacher)) else 1)


def migrate_command(
    old: Annotated[Path, typer.Argument(metavar="OLD.yaml", help="A configuration of the first bakery.")],
    debug: Debug = False,
) -> None:
    """Print a configuration of the first bakery as a recipe."""
    from bakery.migration import migrated

    typer.echo(migrated(old), nl=False)
