"""What several commands share: their options, and flags turned into overrides of the recipe."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeFile = Annotated[Path, typer.Option("--config", "-c", metavar="RECIPE", help="The recipe, a YAML file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key, as section.key=value.")
]
Out = Annotated[Path | None, typer.Option(help="Write here instead of where the recipe says.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the best there is by default.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")]


def overrides(flags: dict[str, Any], sets: list[str] | None) -> list[str]:
    """Flags and --set as one list of key=value; a flag beats nothing but the recipe, --set beats both."""
    given = [
        (key, str(value) if isinstance(value, Path) else value) for key, value in flags.items() if value is not None
    ]
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given] + (sets or [])
