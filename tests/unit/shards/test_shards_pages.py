"""What a row group unpacks to is known before it is unpacked, whatever the footer claims."""

import struct
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caches_by_hand import bits, edit_manifest, record, trust, write_cache
from conftest import ROOT

from bakery.errors import CacheError
from bakery.shards import pages
from bakery.shards.footer import MOST_BYTES, row_groups
from bakery.shards.grid import EXACT
from bakery.shards.pages import _headers, _unpacked, check_row_group
from bakery.shards.parquet import write_parquet
from bakery.shards.reader import CacheReader
from bakery.shards.schema import to_arrow
from bakery.shards.validate import validate

GOLDEN = sorted((ROOT / "data/golden/data").iterdir())
SHARD = "data/train-00000.parquet"
ROWS = 37  # a number that nothing else in the footer has


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_page_headers_say_what_the_footer_says(path):
    """The footer counts a page with its header, so the headers' size is what its compressed pages lack."""
    footer, data = pq.read_metadata(path), path.read_bytes()
    for group in map(footer.row_group, range(footer.num_row_groups)):
        check_row_group(data, group)
        for column in map(group.column, range(group.num_columns)):
            found = list(_headers(data, column))
            headers = column.total_compressed_size - sum(header[3] for header in found)
            assert sum(header[2] for header in found) == column.total_uncompressed_size - headers
            assert _unpacked(data, column)[1] == column.num_values


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "c", [record(n) for n in range(ROWS)])


def table(cache):
    return pq.read_table(cache / SHARD)


def lying(data):
    """The file, claiming 10¹² where its footer says 37; Thrift's integers are as long as they must be."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8].replace(b"\x16" + varint(2 * ROWS), b"\x16" + varint(2 * 10**12))
    assert len(footer) > length
    return data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_a_footer_that_claims_a_trillion_rows(cache):
    """In the sum alone, since the row groups have 32 and 5: then nothing reads it. The manifest is not believed."""
    rows = [bits(r) for r in CacheReader(cache).records()]
    (cache / SHARD).write_bytes(lying((cache / SHARD).read_bytes()))
    assert pq.read_metadata(cache / SHARD).num_rows == 10**12
    trust(cache, SHARD)
    assert [bits(r) for r in CacheReader(cache).records()] == rows
    edit_manifest(cache, lambda tree: tree["splits"]["train"][0].update(rows=10**12))
    [problem] = validate(cache)
    assert "1000000000000 rows in" in problem.what


def test_a_row_group_that_claims_a_trillion_rows(cache):
    pq.write_table(table(cache), cache / SHARD, row_group_size=ROWS)
    (cache / SHARD).write_bytes(lying((cache / SHARD).read_bytes()))
    group = pq.read_metadata(cache / SHARD).row_group(0)
    assert group.num_rows == 10**12
    with pytest.raises(CacheError, match="a row group of 1000000000000 rows holds 37 ids"):
        check_row_group((cache / SHARD).read_bytes(), group)
    trust(cache, SHARD)
    [problem] = validate(cache)
    assert problem.what.endswith("holds 1000000000000 rows, the manifest says 37")


@pytest.mark.parametrize("dictionary", [False, True])
def test_what_unpacks_to_more_than_may_be_read_is_not_unpacked(cache, monkeypatch, dictionary):
    """A row of 2 million zeros: 8 MB from some kilobytes of zstd, or from a few bytes of run lengths."""
    monkeypatch.setattr(pages, "MOST_UNPACKED", 1 << 20)
    assert CacheReader(cache).read("train", 0).example.id == "row0000"
    rows = table(cache).to_pydict()
    rows["topk_ids"][0] = np.zeros(2_000_000, np.int32)
    bomb = pa.table(rows, schema=table(cache).schema)
    pq.write_table(bomb, cache / SHARD, compression="zstd", use_dictionary=dictionary)
    assert (cache / SHARD).stat().st_size < 50_000
    trust(cache, SHARD)
    with pytest.raises(CacheError, match=r"a row group of [\d,]{9,} bytes, 1,048,576 are the most that is read"):
        list(CacheReader(cache).records())
    with pytest.raises(CacheError, match="are the most that is read"):
        CacheReader(cache).lengths("train")


def test_a_row_group_that_calls_its_columns_otherwise(cache):
    """pyarrow goes by the schema and says nothing; whoever went by the row group would count another column's values,
    or take texts for numbers."""
    whole = (cache / SHARD).read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    footer = whole[-8 - size : -8]
    for true, lie in ((b"\x18\x02id", b"\x18\x02no"), (b"\x15\x0c\x19", b"\x15\x02\x19")):
        assert footer.count(true) > 1
        at = footer.rfind(true)
        lying = whole[: -8 - size] + footer[:at] + lie + footer[at + len(true) :] + whole[-8:]
        assert pq.read_table(BytesIO(lying)).equals(table(cache))
        assert row_groups(lying) == row_groups(whole)


NODE = b"\x48\x01x\x15\x02\x00"  # a SchemaElement x of one child


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (b"\x0c", ""),  # empty
        (b"\x1c\x00", "5"),  # a root that does not say how many columns there are
        (b"\xcc" + NODE * 12, "nested more than 8 deep"),
        (b"\x1c\x55\x01\x00", "must be None or an integer"),  # of -1 columns
        (b"\x1c\x55\x00\x00" + b"\x29\x1c\x19\x0c\x28\x01x\x00", "as an integer"),  # a row group of x rows
    ],
)
def test_a_footer_that_is_none(fields, says):
    """From its field 2 on, the schema; before a row group's."""
    thrift = b"\x29" + fields + b"\x00"
    with pytest.raises(CacheError, match=rf"its footer is none \(.*{says}"):
        row_groups(b"PAR1" + thrift + len(thrift).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("bytes_of_id", [8, 2_000])
def test_the_footer_of_the_largest_shard_is_read_and_a_larger_one_is_not(bytes_of_id, tmp_path):
    """Ids are in its statistics. An eighth of the most rows that a recipe may ask for."""
    rows = 65_536 // 8
    one = to_arrow([record(0, (2.0, 3.0))], EXACT, (2.0, 3.0))
    ids = pa.array(f"{n:0{bytes_of_id}}" for n in range(rows))
    whole = pa.Table.from_batches([one] * rows).set_column(0, one.schema.field("id"), ids)
    write_parquet(whole, tmp_path / "shard.parquet")
    data = (tmp_path / "shard.parquet").read_bytes()
    assert sum(group.num_rows for group in row_groups(data)) == rows
    assert 8 * int.from_bytes(data[-8:-4], "little") < MOST_BYTES
    with pytest.raises(CacheError, match="a footer of 16,777,217 bytes"):
        row_groups(bytes(MOST_BYTES + 13) + (MOST_BYTES + 1).to_bytes(4, "little") + b"PAR1")


def test_an_encoding_whose_size_nothing_bounds(cache):
    """Each value of DELTA_BYTE_ARRAY may repeat the one before and add to it."""
    encoding = {"id": "DELTA_BYTE_ARRAY"}
    pq.write_table(table(cache), cache / SHARD, use_dictionary=False, column_encoding=encoding)
    trust(cache, SHARD)
    with pytest.raises(CacheError, match=r"column id: its page headers are none \(in an encoding that no shard has"):
        list(CacheReader(cache).records())


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"", "outside the file"),
        (b"\x15", "index out of range"),
        (b"\x15\x00\x15\x02\x15\x01\x00", "a page of a negative size"),
        (b"\x15\x00\x15" + b"\xff" * 12, "a number without end"),
        (b"\x15\x00" + b"\x1c" * 9, "nested more than 8 deep"),
        (b"\x1e\x00", "a field of no type"),
        (b"\x18\xff\xff\xff\xff\x7f\x00", "index out of range"),
        (b"\x15\x00\x1c\x00\x1c\x00\x00", "not supported between"),
        (b"\x19\xf7\xff\xff\xff\xff\x0f\x00", "a double is cut short"),  # a list of four billion
        (b"\x19\xfc\xf0\xa2\x04" + bytes(70_000), "index out of range"),  # of 70,000 structs, larger than a header is
        (b"\x15\x00\x15\x02\x15\x00\x2c\x15\x01\x15\x00\x00\x00", "a page of negative values"),
        (b"\x15\x00\x15\x02\x15\x00\x2c\x15\x02\x15\x00\x00\x3c\x15\x02\x00\x00", "too many values"),
        (b"\x15\x00\x15\x02\x15\x00\x00", "not enough values"),
    ],
)
def test_a_page_header_that_is_none(header, says):
    """Bytes where the footer says that a column chunk stands."""
    column = SimpleNamespace(
        path_in_schema="topk_ids",
        physical_type="INT32",
        has_dictionary_page=False,
        data_page_offset=4,
        total_compressed_size=len(header),
    )
    group = SimpleNamespace(num_columns=1, num_rows=1, column=lambda number: column)
    with pytest.raises(CacheError, match=says):
        check_row_group(b"PAR1" + header, group)
