"""The command line: typer commands over the Python face. Heavy imports stay inside commands, so --help is instant."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from bakery.errors import BakeryError

USAGE_ERROR: Any = typer.BadParameter.__base__  # typer has no public name for it
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil language models and bake prompts into weights, from teacher log-probabilities cached on disk.",
)

RecipeFile = Annotated[Path, typer.Option("--config", "-c", metavar="RECIPE", help="The recipe, a YAML file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key, as section.key=value.")
]
Out = Annotated[Path | None, typer.Option(help="Write here instead of where the recipe says.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the best there is by default.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command("cache-teacher")
def cache_teacher_command(
    config: RecipeFile,
    out: Out = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts to read instead of the recipe's.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model to ask instead of the recipe's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Entries to keep at each target.")] = None,
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
        "teacher.device": device,
    }
    from bakery.cache import cache_teacher
    from bakery.config import load_recipe

    if dry_run:
        from bakery.estimate import estimate
        from bakery.reports.estimate_table import print_estimate

        recipe = load_recipe(config, _overrides(flags, set_))
        print_estimate(estimate(recipe), writes=recipe.sampling is not None)
        return
    path = cache_teacher(load_recipe(config, _overrides(flags, set_)), extend=extend, reuse=reuse or [])
    typer.echo(f"cache: {path}")


@app.command("distill")
def distill_command(
    config: RecipeFile,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR[=WEIGHT]", help="Train on this cache instead of the recipe's; repeat for several."),
    ] = None,
    out: Out = None,
    student: Annotated[str | None, typer.Option(help="Model to train instead of the recipe's.")] = None,
    support: Annotated[
        str | None, typer.Option(help="renormalized, tail_bucket, truncated, residual_to_label.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="forward_kl, reverse_kl, mixed_kl, jsd, skew_kl, tvd …")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of mixed_kl and jsd.")] = None,
    temperature: Annotated[float | None, typer.Option(help="On both sides.")] = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    set_: Sets = None,
    debug: Debug = False,
) -> None:
    """Stage two: train a student on cached teacher distributions, and measure it on the held-out split."""
    flags = {
        "caches": _cache_sources(cache),
        "training.output_dir": out,
        "student.model_name_or_path": student,
        "loss.support": support,
        "loss.divergence": divergence,
        "loss.beta": beta,
        "loss.temperature": temperature,
    }
    _distill(config, _overrides(flags, set_), device, resume, overwrite)


@app.command("run")
def run_command(
    config: RecipeFile,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    set_: Sets = None,
    debug: Debug = False,
) -> None:
    """Both stages of a recipe, and the evaluation."""
    from bakery.cache import cache_teacher
    from bakery.config import load_recipe
    from bakery.distillation import check_before_teacher

    overrides = _overrides({"teacher.device": device}, set_)
    recipe = load_recipe(config, overrides)
    check_before_teacher(recipe, device, resume, overwrite)
    cache_teacher(recipe)
    _distill(config, overrides, device, resume, overwrite)


@app.command("probe")
def probe_command(config: RecipeFile, set_: Sets = None, debug: Debug = False) -> None:
    """Ask a served teacher what it can do, and check that its log-probs stand where they should."""
    from bakery.config import load_recipe
    from bakery.reports.probe_table import print_capabilities
    from bakery.teachers.opening import probe_teacher

    teacher = load_recipe(config, _overrides({}, set_)).section("teacher")
    raise typer.Exit(0 if print_capabilities(teacher, probe_teacher(teacher)) else 1)


@app.command("validate")
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


@app.command("schema")
def schema_command(debug: Debug = False) -> None:
    """Print the Arrow schema of a shard."""
    from bakery.shards.schema import LOG_NORM, SCHEMA

    typer.echo(SCHEMA.to_string())
    typer.echo(f"{LOG_NORM.name}: {LOG_NORM.type} not null, only where the recipe lists cache.temperatures")


def _distill(config: Path, overrides: list[str], device: str | None, resume: bool, overwrite: bool) -> None:
    from bakery.config import load_recipe
    from bakery.distillation import distill
    from bakery.reports.artifacts import read_samples
    from bakery.reports.table import print_run

    out = distill(load_recipe(config, overrides), device=device, resume=resume, overwrite=overwrite)
    print_run(json.loads((out / "metrics.json").read_text(encoding="utf-8")), read_samples(out))
    typer.echo(f"model:  {out}\nreport: {out / 'report.html'}")


def _overrides(flags: dict[str, Any], sets: list[str] | None) -> list[str]:
    """Flags and --set as one list of key=value; a flag beats nothing but the recipe, --set beats both."""
    given = [
        (key, str(value) if isinstance(value, Path) else value) for key, value in flags.items() if value is not None
    ]
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given] + (sets or [])


def _cache_sources(caches: list[str] | None) -> list[dict[str, Any]] | None:
    if not caches:
        return None
    sources = []
    for text in caches:
        path, _, weight = text.rpartition("=")
        whole = not path or Path(text).exists()  # a directory's name may hold a = of its own
        sources.append({"path": text} if whole else {"path": path, "weight": weight})
    return sources


def _say_plainly() -> None:
    """bakery's own messages as plain lines on stderr; the libraries' only from errors on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("bakery").addHandler(handler)
    logging.getLogger("bakery").setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 bad data, 2 a bad recipe or flag, 130 interrupted."""
    _say_plainly()
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        message = error.format_message()  # empty where no command was given: the help has been shown
        _stop(f"bakery: {message} (see --help)" if message else "", error.exit_code)
    except BakeryError as error:
        _stop(f"bakery: {' '.join(str(error).split())}", error.exit_code)
    except OSError as error:
        _stop(f"bakery: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", 1)
    if code == INTERRUPTED:
        _stop("bakery: interrupted; run the same command again to go on (distill: with --resume)", code)
    sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> None:
    if "--debug" in sys.argv and (error := sys.exc_info()[1]):
        raise error
    if message:
        typer.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
