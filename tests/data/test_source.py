# SPDX-License-Identifier: Apache-2.0
"""Sources: every format and place gives the same documents; what is broken is told."""

import builtins
import gzip
import json
import os
import pickle

import fsspec
import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module

from qwen_jax import config
from qwen_jax.data import files, index, source

TEXTS = [f"document {i}\nwith a second line, wörld {i * 7}\n" for i in range(40)]


def opened(path, tmp_path, **fields):
    max_bytes = fields.pop("max_record_bytes", 50_000_000)
    facts = source.SourceConfig(path=str(path), **fields)
    data = source.DataConfig(
        sources=(facts,),
        cache_dir=str(tmp_path / "cache"),
        max_record_bytes=max_bytes,
    )
    return source.open_sources(data)[0]


def json_lines(texts=TEXTS):
    return b"".join(
        json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0).encode() + b"\n"
        for i, text in enumerate(texts)
    )


def write(path, kind):
    """The same forty documents in a format; returns the path of the source."""
    lines = json_lines()
    half = len(lines) // 2
    if kind == "text":
        path = path / "texts"
        (path / "sub").mkdir(parents=True)
        for i, text in enumerate(TEXTS):
            name = f"{'sub/' * (i % 2)}{i:02d}.txt"
            (path / name).write_text(text, encoding="utf-8")
    elif kind == "jsonl":
        path = path / "a.jsonl"
        path.write_bytes(lines)
    elif kind == "jsonl.gz":  # of two members, as `cat a.gz b.gz` makes
        path = path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif kind == "jsonl.zst":
        path = path / "a.jsonl.zst"
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(lines[:half]) + pack(lines[half:]))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS})
        path = path / "a.parquet"
        parquet.write_table(table, path, row_group_size=7)
    else:
        path = path / "a.arrayrecord"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for line in lines.splitlines():
            writer.write(line)
        writer.close()
    return path


KINDS = ["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrayrecord"]


@pytest.mark.parametrize("place", ["local", "file", "memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_place_gives_the_same_documents(kind, place, tmp_path):
    path = str(write(tmp_path, kind))
    if place == "file":
        path = "file://" + path
    if place == "memory":
        store = fsspec.filesystem("memory")
        url = f"memory://corpus-{kind}/{os.path.basename(path)}"
        store.put(path, url, recursive=True)
        path = url
    one = opened(path, tmp_path)
    assert len(one) == len(TEXTS)
    got = one.read(list(range(len(TEXTS))))
    assert sorted(d.text for d in got) == sorted(TEXTS)
    if kind != "text":  # text files go by name; the others keep the file's order
        assert [d.text for d in got] == TEXTS
    assert all(d.num_bytes == len(d.text.encode()) for d in got)
    # By number, in any order, alone or together.
    numbers = np.random.RandomState(0).permutation(len(TEXTS)).tolist()
    assert [d.text for d in one.read(numbers)] == [got[i].text for i in numbers]
    assert one[3].text == got[3].text
    if place != "memory":
        copy = pickle.loads(pickle.dumps(one))
        assert [d.text for d in copy.read(numbers)] == [got[i].text for i in numbers]
        assert copy.entries == one.entries


def test_content_decides_the_manifest_and_the_hash_of_a_document(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "jsonl")
    os.utime(tmp_path / "b" / "a.jsonl", (1, 1))
    one = opened(tmp_path / "a", tmp_path, name="x")
    two = opened(tmp_path / "b", tmp_path, name="x")
    assert source.manifest([one]) == source.manifest([two])
    texts = opened(write(tmp_path, "text"), tmp_path)
    assert sorted(d.content for d in one.read(range(40))) == sorted(
        d.content for d in texts.read(range(40))
    )
    assert one[0].held_out(1.0) and not one[0].held_out(0.0)


def test_index_of_lines_at_every_block_border(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines().rstrip(b"\n"))
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(files, "BLOCK_BYTES", size)
        one = opened(tmp_path / "a.jsonl", tmp_path / str(size))
        assert [d.text for d in one.read(range(len(one)))] == TEXTS


def test_long_texts_are_cut_at_line_ends(tmp_path):
    lines = [f"line {i} " + "é" * (i % 60) for i in range(2000)]
    (tmp_path / "book.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "wide.txt").write_text("ö" * 5000, encoding="utf-8")
    packed = gzip.compress((tmp_path / "book.txt").read_bytes())
    (tmp_path / "z.txt.gz").write_bytes(packed)
    one = opened(tmp_path, tmp_path / "c", document_bytes=4096, exclude=("cache",))
    records = one.read(range(len(one)))
    assert all(isinstance(r, source.Document) for r in records)
    assert max(r.num_bytes for r in records) <= 4096
    assert min(r.num_bytes for r in records) >= 100
    texts = "".join(r.text for r in records)
    book = "\n".join(lines)
    assert texts == book + "ö" * 5000 + book
    cut = [r.text for r in records if r.text.startswith("line")]
    assert all(text.endswith("\n") for text in cut[:5])
    whole = opened(tmp_path / "book.txt", tmp_path / "d", document_bytes=0)
    assert len(whole) == 1


def test_include_exclude_and_hidden_files(tmp_path):
    for name in (
        "a.py",
        "b.md",
        "c.png",
        ".hidden/d.py",
        "x/__pycache__/e.py",
        "x/f.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")

    def names(**fields):
        one = opened(tmp_path, tmp_path / "cache", **fields)
        return [entry[0] for entry in one.entries]

    assert names() == ["a.py", "b.md", "x/f.py"]
    assert names(include=("*.py",)) == ["a.py", "x/f.py"]
    assert names(include=("**/*.py",), exclude=("x",)) == [".hidden/d.py", "a.py"]
    one = opened(tmp_path, tmp_path / "cache")
    assert one.num_excluded == 3  # a picture and two folders
    glob = opened(f"{tmp_path}/*.??", tmp_path / "cache")
    assert [entry[0] for entry in glob.entries] == ["a.py", "b.md"]
    alone = opened(tmp_path / ".hidden/d.py", tmp_path / "cache")
    assert alone[0].text == "content of .hidden/d.py"


def test_a_link_that_goes_round_is_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("hello")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    one = opened(tmp_path / "b", tmp_path / "cache")
    assert [entry[0] for entry in one.entries] == ["x.txt"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(config.InputError, match="cannot read .*shut': Permission"):
        opened(tmp_path, tmp_path / "cache")


def test_broken_json_lines_are_named(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "bad \xff utf-8"}',
        b"",
        b"{not json}",
        b'{"other": 1}',
        b"[1, 2]",
        b'{"text": 5}',
        b'{"text": "  "}',
        b'{"text": "half a pair \\ud800"}',
        b'{"text": "' + b"x" * 3000 + b'"}',
        b'{"text": "cut sho',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    one = opened(path, tmp_path, max_record_bytes=1000)
    got = one.read(range(len(one)))
    assert got[0].text == "good"
    reasons = "bad_utf8 empty bad_json missing_field missing_field not_text empty "
    reasons += "bad_utf8 too_large truncated"
    assert [bad.reason for bad in got[1:]] == reasons.split()
    starts = np.cumsum([0] + [len(line) + 1 for line in lines])
    assert [bad.offset for bad in got[1:]] == starts[1:-1].tolist()
    assert {bad.file for bad in got[1:]} == {str(path)}


def test_broken_text_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok so far \xff\xfe")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"ELF\0\0")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "e.txt").write_bytes(b"x" * 2000)
    one = opened(tmp_path, tmp_path / "c", max_record_bytes=1000)
    got = one.read(range(5))
    assert got[0] == source.Bad("bad_utf8", str(tmp_path / "a.txt"), 10)
    assert got[1] == source.Bad("empty_file", str(tmp_path / "b.txt"), 0)
    assert got[2] == source.Bad("binary", str(tmp_path / "c.txt"), 3)
    assert got[3].text == "with a mark" and got[3].num_bytes == 11
    assert got[4] == source.Bad("too_large", str(tmp_path / "e.txt"), 0)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "txt.gz"])
@pytest.mark.parametrize("how", ["truncated", "corrupt", "nothing"])
def test_a_compressed_stream_that_breaks_off(kind, how, tmp_path):
    rng = np.random.RandomState(0)
    words = [" ".join(map(str, rng.randint(0, 10**6, 40))) for _ in range(2000)]
    plain = json_lines(words) if kind.startswith("jsonl") else "\n".join(words).encode()
    zst = kind.endswith("zst")
    data = zstandard.compress(plain) if zst else gzip.compress(plain)
    half = len(data) // 2
    broken = {
        "truncated": data[:half],
        "corrupt": data[:half] + b"\x07" * 200 + data[half + 200 :],
        "nothing": b"not compressed at all" * 10,
    }[how]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(broken)
    one = opened(path, tmp_path)
    got = one.read(range(len(one)))
    bad = [record for record in got if isinstance(record, source.Bad)]
    good = [record.text for record in got if isinstance(record, source.Document)]
    reason = "truncated" if how == "truncated" else "corrupt"
    assert [b.reason for b in bad if b.reason != "empty"] == [reason]
    if how == "truncated" and kind.startswith("jsonl"):
        assert good == words[: len(good)] and 200 < len(good) < 2000
    elif how == "truncated":
        assert "\n".join(words).startswith("".join(good)) and good
    else:  # nothing of a member whose checksum fails is used
        assert not good


def test_members_before_a_corrupt_one_are_used(tmp_path):
    lines = json_lines().splitlines(keepends=True)
    members = [gzip.compress(b"".join(lines[i : i + 10])) for i in range(0, 40, 10)]
    broken = members[2][:-8] + b"\0" * 8  # a wrong checksum
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join([*members[:2], broken, members[3]]))
    got = opened(path, tmp_path).read(range(21))
    assert [record.text for record in got[:20]] == TEXTS[:20]
    start = len(b"".join(lines[:20]))
    assert got[20] == source.Bad("corrupt", str(path), start)


def test_a_broken_parquet_file(tmp_path):
    path = write(tmp_path, "parquet")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    one = opened(path, tmp_path)
    assert one.read(range(len(one))) == [source.Bad("truncated", str(path), 0)]


def test_parquet_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "four"]
    names = pyarrow.array(["a", "b", "a", "b"]).dictionary_encode()
    parquet.write_table(
        pyarrow.table({"text": texts, "names": names, "n": [1, 2, 3, 4]}), path
    )
    got = opened(path, tmp_path).read(range(4))
    assert (got[0].text, got[3].text) == ("one", "four")
    assert [bad.reason for bad in got[1:3]] == ["missing_field", "empty"]
    named = opened(path, tmp_path, text_field="names")
    assert [d.text for d in named.read(range(4))] == ["a", "b", "a", "b"]
    with pytest.raises(config.InputError, match="no column 'txt'; did you mean 'text'"):
        opened(path, tmp_path, text_field="txt")
    with pytest.raises(config.InputError, match="'n' holds int64; wanted text"):
        opened(path, tmp_path, text_field="n")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(config.InputError, match=r"pip install 'qwen_jax\[parquet\]'"):
        opened(path, tmp_path)


def test_a_broken_array_record_file(tmp_path):
    path = tmp_path / "a.arrayrecord"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    texts = [f"raw text {i} " * 30 for i in range(300)]
    for text in texts:
        writer.write(text.encode())
    writer.close()
    data = path.read_bytes()
    raw = opened(path, tmp_path, text_field="")
    assert [d.text for d in raw.read(range(300))] == texts
    middle = 20_000
    path.write_bytes(data[:middle] + b"\xff" * 300 + data[middle + 300 :])
    got = opened(path, tmp_path, text_field="").read(range(300))
    bad = [i for i, record in enumerate(got) if isinstance(record, source.Bad)]
    assert 0 < len(bad) < 20 and got[bad[0]].reason == "corrupt"
    assert got[bad[0]].offset == bad[0] and got[bad[-1] + 1].text == texts[bad[-1] + 1]
    path.write_bytes(data[:middle])
    one = opened(path, tmp_path, text_field="")
    assert one.read(range(len(one))) == [source.Bad("truncated", str(path), 0)]


def test_ready_ids(tmp_path):
    lines = [
        {"ids": [5, 6, 7], "prompt_tokens": 2},
        {"ids": [8]},
        {"ids": []},
        {"ids": "text"},
        {"ids": [1.5]},
        {"ids": [1, 2], "prompt_tokens": 2},
        {"ids": [2**40]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got = opened(tmp_path / "a.jsonl", tmp_path, tokens_field="ids").read(range(7))
    assert got[0].tokens.tolist() == [5, 6, 7] and got[0].prompt_tokens == 2
    assert got[1].tokens.tolist() == [8] and got[1].prompt_tokens == 0
    assert [bad.reason for bad in got[2:]] == ["empty", *["not_tokens"] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_or_goes_is_named(kind, tmp_path):
    path = write(tmp_path, kind)
    one = opened(path, tmp_path)
    file = path / "00.txt" if kind == "text" else path
    os.utime(file, ns=(1, 1))
    with pytest.raises(config.InputError, match=rf"{file.name}' changed since"):
        one.read(range(40))
    file.unlink()
    with pytest.raises(config.InputError, match=rf"{file.name}' is gone"):
        one.read(range(40))


def test_a_remote_file_that_changes_or_goes_is_named(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("memory://changing/a.jsonl", json_lines())
    one = opened("memory://changing/a.jsonl", tmp_path)
    assert one[0].text == TEXTS[0]
    store.pipe("memory://changing/a.jsonl", json_lines() + b"\n")
    with pytest.raises(config.InputError, match=r"a.jsonl' changed since"):
        one[0]
    store.rm("memory://changing/a.jsonl")
    with pytest.raises(config.InputError, match=r"a.jsonl' is gone"):
        one[0]


def test_changes_between_manifests_are_told(tmp_path):
    folder = write(tmp_path, "text")
    before = source.manifest([opened(folder, tmp_path, name="web")])
    (folder / "00.txt").write_text("other")
    (folder / "02.txt").unlink()
    (folder / "new.txt").write_text("new")
    after = source.manifest([opened(folder, tmp_path, name="web")])
    assert before["hash"] != after["hash"]
    assert source.changes(before, after) == [
        "'00.txt' of source 'web' changed (40 bytes, 1 records before; 5 bytes, "
        + "1 records now)",
        "'02.txt' of source 'web' is gone",
        "'new.txt' of source 'web' is new",
    ]
    other = source.manifest([opened(folder, tmp_path, name="net")])
    assert source.changes(after, other) == [
        "source 'net' appeared",
        "source 'web' is gone",
    ]


def test_a_tag_of_a_store_does_not_compare_with_content(tmp_path):
    def manifest(digest):
        return {
            "hash": digest,
            "sources": {"web": {"fields": [], "files": [["a", 5, digest, 1]]}},
        }

    told = source.changes(manifest("etag:1"), manifest("2"))
    assert told == [
        "'a' of source 'web' is known by a store's tag at one place and by its content "
        + "at the other, which do not compare"
    ]
    assert "changed (5 bytes" in source.changes(manifest("1"), manifest("2"))[0]


def test_sources_of_a_resumed_run_keep_the_names_they_began_with(tmp_path):
    folder = write(tmp_path, "text")
    open_one, named = opened(folder, tmp_path), opened(folder, tmp_path, name="web")

    def names(*stored):
        kept = source.under_names([open_one, named], stored)
        assert [one.entries for one in kept] == [open_one.entries, named.entries]
        return [one.name for one in kept]

    assert open_one.name == "texts"
    assert names("old", "web") == ["old", "web"]
    assert names("old", "net") == ["old", "web"]  # given by the user: it stays
    assert names("web", "texts") == ["texts", "web"]  # only their order differs
    assert names("old") == ["texts", "web"]  # there were fewer
    assert open_one.name == "texts"


def test_a_store_whose_package_is_missing_is_told_with_its_extra(tmp_path, monkeypatch):
    def missing(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    told = r"install gcsfs to access .*: pip install 'qwen_jax\[gcs\]'"
    with pytest.raises(config.InputError, match=told):
        opened("gs://bucket/texts", tmp_path)
    with pytest.raises(config.InputError, match="Storage$"):
        opened("other://bucket/texts", tmp_path)


def test_mistakes_in_the_config(tmp_path):
    with pytest.raises(config.InputError, match=r"data.sources is empty"):
        source.open_sources(source.DataConfig())
    (tmp_path / "texts").mkdir()
    with pytest.raises(config.InputError, match="does not exist; did you mean 'texts'"):
        opened(tmp_path / "text", tmp_path)
    with pytest.raises(config.InputError, match="no file to read under"):
        opened(tmp_path / "texts", tmp_path)
    with pytest.raises(config.InputError, match="no file to read under"):
        opened(f"{tmp_path}/*.nothing", tmp_path)
    with pytest.raises(config.InputError, match="does not exist"):
        opened("memory://nowhere/at/all", tmp_path)
    with pytest.raises(config.InputError, match="cannot open 'nosuch://x'"):
        opened("nosuch://x", tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(config.InputError, match="hold no record"):
        opened(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(config.InputError, match="'json' is unknown; did you mean"):
        opened(tmp_path, tmp_path, format="json")
    with pytest.raises(config.InputError, match="document_bytes=5"):
        opened(tmp_path, tmp_path, document_bytes=5)
    with pytest.raises(config.InputError, match=r"data.holdout_share=2.0"):
        source.DataConfig(holdout_share=2.0)
    with pytest.raises(config.InputError, match=r"data.streams=0"):
        source.DataConfig(streams=0)
    twice = source.SourceConfig(path="x", name="same")
    with pytest.raises(config.InputError, match="two data sources are named 'same'"):
        source.open_sources(source.DataConfig(sources=(twice, twice)))


def test_the_config_survives_the_door():
    data = source.DataConfig(
        sources=(source.SourceConfig(path="x", include=("*.py",)),),
        stages=((10, {"x": 1.0}), (20, {"x": 0.5})),
    )
    thawed = json.loads(json.dumps(config.thaw(data)))
    assert config.freeze(source.DataConfig, thawed) == data
    thawed["sources"][0]["weigth"] = 1.0
    with pytest.raises(config.InputError, match="'weigth' .* did you mean 'weight'"):
        config.freeze(source.DataConfig, thawed)


def test_the_cache_is_used_swept_and_told_of(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl.gz")
    opened(path, tmp_path)
    cache = tmp_path / "cache"
    (entry,) = [p for p in cache.iterdir() if p.is_dir()]
    host = os.uname().nodename
    with monkeypatch.context() as patch:
        patch.setattr(index, "scan_lines", None)  # nothing is indexed again
        assert len(opened(path, tmp_path)) == 40
    # A process that was killed while it built the entry leaves a folder aside.
    for inside in entry.iterdir():
        inside.unlink()
    entry.rename(cache / f"{entry.name}.{host}.999999999")
    assert len(opened(path, tmp_path)) == 40
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [entry.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(config.InputError, match=r"cannot write the data cache .*file"):
        opened(path, tmp_path / "file")


def test_a_full_disk_under_the_cache(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl.gz")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "scan_lines", full)
    with pytest.raises(config.InputError, match="No space left on device.*free some"):
        opened(path, tmp_path)
    assert not list((tmp_path / "cache").iterdir())
