"""What a probe found, as a table for a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bakery.config import TeacherConfig
from bakery.teachers.probing import Capabilities


def print_capabilities(teacher: TeacherConfig, found: Capabilities) -> bool:
    """Prints the table; whether a cache can be filled from this server at the recipe's K."""
    assert teacher.api is not None
    api, notes = teacher.api, found.notes
    scored = found.score_by or "no"
    rows = [
        ("server", "reachable", api.base_url),
        ("model", "served", api.model if len(found.models) == 1 else f"{api.model}, of {', '.join(found.models)}"),
        ("context", "–" if found.max_length is None else f"{found.max_length:,}", "tokens, as the server says"),
        ("write responses", _yes(found.generates), notes.get("generates", f"top-{teacher.top_k} with exact token ids")),
        ("score responses", scored, notes.get("score_by", f"top-{teacher.top_k} with exact token ids")),
        ("alignment", _yes(found.aligned), notes.get("aligned", _aligned(found))),
        ("raw log-probs", _yes(found.raw), "they do not follow the sampling temperature" if found.raw else ""),
        ("vocabulary", _yes(found.whole_vocabulary), "it takes the tokenizer's last id"),
        ("largest K", str(found.largest_k or "–"), f"of those tried; the recipe asks for {teacher.top_k}"),
    ]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "found", ""):
        table.add_column(column, overflow="fold")
    for name, value, note in rows:
        table.add_row(name, escape(value), escape(note))
    Console().print(table)
    return (found.generates or found.score_by is not None) and found.aligned is not False and found.raw is not False


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _aligned(found: Capabilities) -> str:
    return (
        "a generated token scores as it was generated; no shift fits better"
        if found.aligned
        else "needs both of the above"
    )
