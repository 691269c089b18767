"""Commands about caches: fill one, check it, print its schema."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bakery.commands.options import Debug, Device, Out, RecipeFile, Sets, overrides
from bakery.errors import BakeryError, RecipeError


def cache_teacher_command(
    config: RecipeFile,
    out: Out = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts to read instead of the recipe's.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model to ask instead of the recipe's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Entries to keep at each target.")] = None,
    support: Annotated[
        str | None, typer.Option(help="topk, the most likely tokens; or sampled, draws from all of them.")
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Draws at each target, of support sampled; 50.")] = None,
    device: Device = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the prompts that a complete cache does not hold.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell the price from a small sample; keep nothing.")
    ] = False,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Take over what this cache already answers; repeatable.")
    ] = None,
    shard_index: Annotated[int | None, typer.Option(help="Fill this part only, from 0 on; see --num-shards.")] = None,
    num_shards: Annotated[
        int | None, typer.Option(help="Into how many parts, each in a directory of its own, for `bakery merge`.")
    ] = None,
    set_: Sets = None,
    debug: Debug = False,
) -> None:
    """Stage one: ask the teacher once, and keep its top-k log-probabilities in Parquet shards.

    Run it again to go on after an interruption; a complete cache is left alone.
    """
    flags = {
        "cache.out": out,
        "prompts.path": prompts,
        "teacher.model_name_or_path": teacher,
        "teacher.top_k": top_k,
        "teacher.support": support,
        "teacher.draws": draws,
        "teacher.device": device,
    }
    from bakery.cache import cache_teacher
    from bakery.config import load_recipe

    recipe = load_recipe(config, overrides(flags, set_))
    if dry_run:
        from bakery.estimate import estimate
        from bakery.reports.estimate_table import print_estimate

        if extend or reuse or shard_index is not None or num_shards is not None:
            raise RecipeError("--dry-run is of all prompts: leave out --extend, --reuse, --shard-index, --num-shards")
        print_estimate(estimate(recipe), writes=recipe.sampling is not None)
        return
    path = cache_teacher(recipe, extend=extend, reuse=reuse or [], part=_part(shard_index, num_shards))
    typer.echo(f"cache: {path}")


def merge_command(
    parts: Annotated[list[Path], typer.Argument(metavar="PART…", help="What --shard-index made, all of it.")],
    out: Annotated[Path, typer.Option(help="The cache to make.")],
    debug: Debug = False,
) -> None:
    """Join the parts of a cache into the one that a single process would have filled."""
    from bakery.shards.merge import merge

    typer.echo(f"cache: {merge(parts, out)}")


def upgrade_command(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Cache directories.")],
    debug: Debug = False,
) -> None:
    """Bring caches of an older format to today's, in place, so that they can be resumed and extended.

    Reading needs no upgrade. Finish runs that are half trained first: after it they do not resume.
    """
    from bakery.shards.upgrade import upgrade
    from bakery.shards.versions import FORMAT_VERSION

    failed = False
    for directory in directories:
        try:
            done = upgrade(directory)
        except BakeryError as error:
            failed = True
            typer.echo(f"{directory}: {error}", err=True)
        else:
            typer.echo(f"{directory}: {'now of' if done else 'is of'} format {FORMAT_VERSION}")
    raise typer.Exit(1 if failed else 0)


def validate_command(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Cache directories.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for machines.")] = False,
    debug: Debug = False,
) -> None:
    """Check caches: manifest, checksums, schema and every row. Exits 0 when all are sound, 1 when one is not."""
    from bakery.shards.validate import validate

    found = {str(directory): validate(directory) for directory in directories}
    if as_json:
        tree = {name: [vars(problem) for problem in problems] for name, problems in found.items()}
        typer.echo(json.dumps({"valid": not any(found.values()), "problems": tree}, indent=2))
    else:
        for name, problems in found.items():
            for problem in problems:
                typer.echo(f"{name}: {problem}", err=True)
            if not problems:
                typer.echo(f"{name}: sound")
    raise typer.Exit(1 if any(found.values()) else 0)


def _part(index: int | None, of: int | None) -> tuple[int, int] | None:
    if index is None and of is None:
        return None
    if index is None or of is None or not 0 <= index < of:
        raise RecipeError(f"--shard-index is {index}, --num-shards {of}: give both, the index from 0 to one below")
    return index, of


def schema_command(debug: Debug = False) -> None:
    """Print the Arrow schema of a shard."""
    from bakery.shards.schema import LOG_NORM, SCHEMA

    typer.echo(SCHEMA.to_string())
    typer.echo(f"{LOG_NORM.name}: {LOG_NORM.type} not null, only where the recipe lists cache.temperatures")
