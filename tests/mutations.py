"""Hypothesis strategies that spoil what is good: trees of JSON, and bytes."""

from copy import deepcopy

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [0, -1, 1, 2**31 - 1, 2**31, 10**12, 10**30, "", "../../x", "/etc/passwd", "x" * 999, "\x1b[2J", "\0"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
) | st.sampled_from([eval("[" * 80 + "]" * 80), [[]] * 50])


# One to three values replaced, removed, doubled or moved to another key: what, where (as a fraction), with what.
TREE_SPOILS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "remove", "double", "rename"]),
        st.floats(0, 1, exclude_max=True),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)


def spoil_tree(tree, spoils):
    tree = {"": deepcopy(tree)}
    for what, place, value in spoils:
        places = list(_places(tree))
        if not places:
            break
        holder, key = places[int(place * len(places))]
        match what:
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, deepcopy(holder[key]))
            case "rename" if isinstance(holder, dict):
                holder[str(value)[:9]] = holder.pop(key)
            case _:
                holder[key] = deepcopy(value)
    return tree.get("")


def _places(tree):
    """Every container of a tree with every key or index in it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


# One to four flips, cuts, insertions or repetitions: what, where (as a fraction), how.
BYTE_SPOILS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "set", "cut", "insert", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=4,
)
NUMBERS = [b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\x80" * 9 + b"\x01"]


def spoil(data, spoils):
    data = bytearray(data)
    for what, place, how in spoils:
        at = int(place * len(data))
        match what:
            case "flip" if data:
                data[at] ^= how
            case "set":
                new = NUMBERS[how % len(NUMBERS)]
                data[at : at + len(new)] = new
            case "cut":
                del data[at : at + how]
            case "insert":
                data[at:at] = bytes([how]) * (how % 16)
            case "repeat":
                data[at:at] = data[at : at + how]
    return bytes(data)
