"""Rows of another cache that answer this one's questions: the same teacher, asked the same, never paid for twice."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bakery.errors import CacheError
from bakery.records import Record
from bakery.shards.manifest import STEPS, Identity
from bakery.shards.reader import CacheReader


def reusable(reader: CacheReader, identity: Identity, wanted: set[str]) -> Iterator[Record]:
    """Records of `reader` whose ids are wanted, cut down to the identity's k and top-mass.

    Ids are content keys that hold the teacher's fingerprint, so an equal id is an equal question to an equal teacher.
    Raises CacheError where the other cache keeps less than this one wants of each answer, or a sample of other draws.
    """
    other = reader.manifest
    if other.draws != identity.draws:
        there, here = (f"samples of {draws} draws" if draws else "a top-k" for draws in (other.draws, identity.draws))
        raise CacheError(f"--reuse {reader.path}: it holds {there}, this recipe wants {here}; neither makes the other")
    keeps_enough = {
        "k": other.k >= identity.k,
        "top_mass": (other.top_mass or 1) >= (identity.top_mass or 1),
        **{name: getattr(other, name) <= getattr(identity, name) for name in STEPS},
        "temperatures": {*identity.temperatures} <= {*other.temperatures},
    }
    for name, enough in keeps_enough.items():
        if not enough:
            theirs, mine = (getattr(cache, name) for cache in (other, identity))
            cure = f"; set {other.steps_told}, as it was made" if name in STEPS else ""
            raise CacheError(
                f"--reuse {reader.path}: its {name} is {theirs}, this recipe wants {mine}; it keeps too little{cure}"
            )
    columns = [other.temperatures.index(t) for t in identity.temperatures]
    for split in reader.splits:
        for record in reader.records(split):
            if record.example.id in wanted:
                topk = record.topk.keep_entries(identity.k)
                topk = topk if identity.top_mass is None else topk.keep_mass(identity.top_mass)
                yield replace(record, topk=replace(topk, log_norm=np.ascontiguousarray(topk.log_norm[:, columns])))
