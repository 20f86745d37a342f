"""Files of records: read as json.loads reads them, several with weights; others are refused with the line."""

import json
import os
from pathlib import Path

import pytest

from model import UserError
from records import Selection, data_files, read_records


def test_several_files_and_their_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.json", "b.jsonl", "c:3.json", "d,e.json", "f.json:2")):
        Path(name).write_text(json.dumps({"i": i}) if name == "b.jsonl" else json.dumps([{"i": i}, {"i": i}]))
    for text, files in (
        ("a.json", [("a.json", 1)]),
        ("a.json:2,b.jsonl:0.5", [("a.json", 2), ("b.jsonl", 0.5)]),
        ("a.json,b.jsonl:3", [("a.json", 1), ("b.jsonl", 3)]),
        ("c:3.json", [("c:3.json", 1)]),  # names that exist are taken as they are
        ("c:3.json:2,a.json", [("c:3.json", 2), ("a.json", 1)]),
        ("d,e.json", [("d,e.json", 1)]),
        ("f.json:2", [("f.json:2", 1)]),
    ):
        assert data_files(text) == files
    records = read_records("b.jsonl:2,a.json")
    assert [record["i"] for record in records] == [1, 0, 0] and records[1].folder == "."
    assert records.shares() == [(2, range(1)), (1, range(1, 3))]
    for weight in ("0", "-1", "nan", "inf", "x", "", "1e5000"):
        with pytest.raises(UserError, match="the weight is .*; expected a number above 0"):
            read_records(f"a.json:{weight},b.jsonl")
    with pytest.raises(UserError, match="https://a.b/c.json is a web address; download it first"):
        read_records("a.json,https://a.b/c.json")
    Path("a.csv").write_text("question,answer")
    with pytest.raises(UserError, match="a.csv: a table, which is not read"):
        read_records("a.csv")
    with pytest.raises(UserError, match="b.json: no such file.*did you mean b.jsonl"):
        read_records("a.json:2,b.json")


def write(path, records, separator):
    """The records, with and without escapes, as a .json array or as .jsonl."""
    texts = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    path.write_text(separator.join(texts) if path.suffix == ".jsonl" else f" [{separator.join(texts)} ]\n", "utf-8")
    return path


@pytest.mark.parametrize("name, separator", [("a.json", " ,\n"), ("a.jsonl", "\n"), ("a.jsonl", "\r\n\n")])
def test_a_file_is_read_as_json_loads_reads_it(tmp_path, name, separator):
    whole = [{"i": i, "text": 'ä \u00e9\u2028 [{"},\\', "empty": {}, "list": [1, [2.5, None]]} for i in range(30)]
    path = write(tmp_path / name, whole, separator)
    for mark in (b"", b"\xef\xbb\xbf"):  # the second as Windows saves UTF-8
        path.write_bytes(mark + path.read_bytes())
        records = read_records(path)
        assert list(records) == whole and records[-1]["i"] == 29 and len(records) == 30
        assert [r["i"] for r in Selection(records, [3, 7, 11])] == [3, 7, 11]
        assert len(records.data) <= path.stat().st_size  # that is all that is kept, and 8 bytes a record
    with pytest.raises(IndexError):
        records[30]


NOT_JSON = {
    "a.json": {
        "line 1 column 1 is not JSON (expected [ ] around the records": ["hello", "", "12", '{"a": 1}\n{"a": 2}'],
        "line 3 column 2 is not JSON (Expecting ',' or ']')": ["[\n{}\n {}]"],
        "is not JSON": ["[{},]", "[{}", "[", "[,", "[{}}", '[{"a": 1},\n{"a": }]', '[{}, {"a": "' + "x" * 9000],
        "line 1 column 5 is not JSON (Extra data)": ["[{}]]"],
        "record 0 is nested too deeply": ['[{"a": ' + "[" * 100_000],
        "record 0 Exceeds the limit (4300 digits)": ['[{"a": ' + "1" * 5000 + "}]"],
        "record 1 holds half a character": ['[{}, {"a": "\\ud83d"}]'],
        "record 1 is a int, expected an object": ["[{}, 1]"],
        "line 2 is not UTF-8 (byte 9)": [b'[\n{"a": "\xc3"}]'],
        "holds no records": ["[]", " [ ] "],
    },
    "a.jsonl": {
        "line 4 column 7 is not JSON": ['{"a": 1}\n\n{"a": 2}\n{"a": \n'],
        "record 1 is a list": ["{}\n[]\n"],
        "record 0 is nested too deeply": ['{"a":' + "[" * 100_000],
        "record 1 holds half a character": ['{}\n{"a": "\\udc00"}'],
        "line 1 column 4 is not JSON (Extra data)": ["{} {}"],
        "holds no records": ["\n\n"],
    },
}


@pytest.mark.parametrize("name, message", [(name, message) for name in NOT_JSON for message in NOT_JSON[name]])
def test_what_is_no_dataset(tmp_path, name, message):
    for content in NOT_JSON[name][message]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as caught:
            read_records(tmp_path / name)
        assert message in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.json").touch()
    for name in ("none.json", "zero\0.json", "x" * 300):
        with pytest.raises(UserError, match="no such file"):
            read_records(tmp_path / name)
    for name, hint in (("fifo.jsonl", "makes one$"), ("folder", "did you mean .*folder/train.json")):
        with pytest.raises(UserError, match=f"not a file; .*{hint}"):
            read_records(tmp_path / name)  # returns at once: nothing opens the fifo
