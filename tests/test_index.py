"""Large and broken datasets: what is kept in memory, what is told, what is refused."""

import json
import os
import tracemalloc

import pytest

import evaluate as evaluation
from config import GRPO
from dataset import index
from dataset.index import Records, Selection, read_records
from model import UserError

TURNS = [{"from": "human", "value": "ä\\u00e9 [{\"},"}, {"from": "gpt", "value": "1"}]
RECORD = {"video": "a.mp4", "conversations": TURNS}


def write(path, records, lines=False):
    texts = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    path.write_text("\n".join(texts) if lines else "[" + " ,\n".join(texts) + " ]\n", encoding="utf-8")
    return path


def told(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("piece", [1, 7, 64, 2**20])
def test_an_array_is_read_as_json_loads_reads_it(tmp_path, monkeypatch, piece):
    """However the file falls into pieces: within a character of two bytes, an escape, a bracket in a string."""
    monkeypatch.setattr(index, "PIECE", piece)
    records = [RECORD | {"i": i, "empty": {}, "list": [1, [2.5, None]]} for i in range(30)]
    path = write(tmp_path / "a.json", records)
    found = read_records(path)
    assert list(found) == records == json.loads(path.read_text(encoding="utf-8"))
    assert found[-1]["i"] == 29 and [r["i"] for r in found[3:12:4]] == [3, 7, 11]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows saves UTF-8
    assert list(read_records(path)) == records
    lines = write(tmp_path / "a.jsonl", records, lines=True)
    assert list(read_records(lines)) == records


def test_memory_holds_places_not_records(tmp_path):
    """1,000 times the records, 8 bytes each more: the rest is bounded. bench/index.py times a million."""
    for name, lines in (("a.json", False), ("a.jsonl", True)):
        path = write(tmp_path / name, [RECORD | {"i": i} for i in range(20_000)], lines)
        tracemalloc.start()
        records = read_records(path)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(records) == 20_000 and records[19_999]["i"] == 19_999
        assert kept < 20_000 * 8 * 1.2 + 100_000 < path.stat().st_size / 5, f"{kept} bytes kept"


def test_a_large_jsonl_is_checked_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHECKED_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"i": 0}\n' + '{"i": 1}\n{"i": \n' * 20)
    records = read_records(path)
    assert len(records) == 41 and records[1] == {"i": 1}
    with pytest.raises(UserError, match="a.jsonl: line 3 is not JSON"):
        records[2]


def test_what_is_no_dataset(tmp_path):
    file = tmp_path / "a.json"
    assert "line 1 column 1 is not JSON" in told(file, "hello")
    assert "line 1 column 1 is not JSON" in told(file, "")
    assert "line 3 column 2 is not JSON (Expecting ',' delimiter)" in told(file, '[\n{}\n {}]')
    assert all("is not JSON" in told(file, text) for text in ("[{},]", "[{}", "[", "[,", "[{}}"))
    assert "line 1 column 5 is not JSON (Extra data)" in told(file, "[{}]]")
    assert "nested too deeply" in told(file, '[{"a": ' + "[" * 100_000)
    assert "4300" in told(file, '[{"a": ' + "1" * 5000 + "}]")
    assert "record 1 holds half a character" in told(file, '[{}, {"a": "\\ud83d"}]')
    assert "byte 8 is not UTF-8" in told(file, b'[{"a": "\xc3"}]')
    lines = tmp_path / "a.jsonl"
    assert "line 1 is nested too deeply" in told(lines, "[" * 100_000)
    assert "line 1 is not JSON" in told(lines, '{"a": ' + "1" * 5000 + "}")
    assert "line 2 holds half a character" in told(lines, '{}\n{"a": "\\udc00"}')
    assert "line 2 is not UTF-8" in told(lines, b'{}\n{"a": "\xff"}')
    assert "found a JSON int" in told(file, "12") and "put it into [ ]" in told(file, "{}")


def test_a_record_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(index, "PIECE", 100)
    assert "Unterminated string" in told(tmp_path / "a.json", '[{}, {"a": "' + "x" * 9000)
    assert "line 2 is longer than 1000 bytes" in told(tmp_path / "a.jsonl", "{}\n" + " " * 9000)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "away.json").symlink_to(tmp_path / "nowhere.json")
    for name in ("fifo.jsonl", "folder.json"):
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            read_records(tmp_path / name)  # returns at once: nothing opens the fifo
    for name in ("away.json", "none.json", "zero\0.json", "x" * 300):
        with pytest.raises(UserError, match="no such file"):
            read_records(tmp_path / name)


def test_a_file_that_is_cut_while_it_is_used(tmp_path):
    path = write(tmp_path / "a.json", [RECORD] * 5)
    records = read_records(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="a.json: line . is not JSON"):
        records[4]


# -- Answers that cannot be read


def quiz(i, answer="(A) up"):
    question = {"from": "human", "value": "<video>\nWhere?\nOptions:\n(A) up\n(B) down"}
    return {"id": f"q{i}", "video": "a.mp4", "conversations": [question, {"from": "gpt", "value": answer}]}


def test_later_answers_are_looked_at_when_they_come_up(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CHECKED_RECORDS", 10)
    wrong = {3: "sideways", 14: "who knows"}
    read = []
    monkeypatch.setattr(Records, "__getitem__", lambda self, i, get=Records.__getitem__: read.append(i) or get(self, i))
    records = read_records(write(tmp_path / "a.json", [quiz(i, wrong.get(i, "(A) up")) for i in range(20)]))
    read.clear()  # of the look for copies
    good, notes = evaluation.answerable(GRPO(max_skip_share=0.2), "training", records)
    assert read == list(range(10)) and len(good) == 19  # no more than the first ten were parsed
    assert notes[0].startswith("the answers of 1 of 10 training samples cannot be read") and "sample 3 (q3)" in notes[0]
    assert good[3]["id"] == "q4" and good[18]["id"] == "q19"
    with pytest.raises(UserError, match=r"sample 14 \(q14\)"):
        good[13]
    assert isinstance(good[5:], Selection) and good[5:][0]["id"] == "q6"
