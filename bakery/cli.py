"""The command line: which commands there are, and how an error ends. Heavy imports stay inside commands, so --help is
instant."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from bakery.commands import caching, recipes, training
from bakery.errors import BakeryError, printable
from bakery.files import reason
from bakery.stopping import Stopped, stop_on_signals

USAGE_ERROR: Any = typer.BadParameter.__base__  # typer has no public name for it

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil language models and bake prompts into weights, from teacher log-probabilities cached on disk.",
)

COMMANDS: dict[str, Callable[..., None]] = {
    "cache-teacher": caching.cache_teacher_command,
    "distill": training.distill_command,
    "run": training.run_command,
    "evaluate": training.evaluate_command,
    "probe": recipes.probe_command,
    "migrate": recipes.migrate_command,
    "merge": caching.merge_command,
    "upgrade": caching.upgrade_command,
    "validate": caching.validate_command,
    "schema": caching.schema_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _say_plainly() -> None:
    """bakery's own messages as plain lines on stderr; the libraries' only from errors on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("bakery").addHandler(handler)
    logging.getLogger("bakery").setLevel(logging.INFO)
    if logging.lastResort is not None:  # where loggers without a handler speak
        logging.lastResort.setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 bad data, 2 a bad recipe or flag, 130 Ctrl-C, 143 SIGTERM."""
    _say_plainly()
    stop_on_signals()
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        message = error.format_message()  # empty where no command was given: the help has been shown
        _stop(f"bakery: {message} (see --help)" if message else "", error.exit_code)
    except BakeryError as error:
        _stop(f"bakery: {error}", error.exit_code)
    except OSError as error:
        _stop(f"bakery: {f'{error.filename}: {reason(error)}' if error.filename else error.strerror or error}", 1)
    except Stopped as stop:
        typer.echo(f"bakery: stopped by {stop}; run the same command again to go on (distill: with --resume)", err=True)
        _leave(stop.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _leave(code: int) -> None:
    """At once, without the threads of calls that are under way: nobody waits for their answers any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop(message: str, code: int) -> None:
    if "--debug" in sys.argv and (error := sys.exc_info()[1]):
        raise error
    if message:
        typer.echo(printable(message), err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
