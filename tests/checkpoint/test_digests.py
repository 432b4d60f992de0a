# SPDX-License-Identifier: Apache-2.0
"""Files are dealt out whole and evenly, and a manifest names exactly what is there."""

import json
import types

import hypothesis
import hypothesis.strategies as st
import pytest

from qwen_jax.checkpoint import catalog, digests, manifest, steps

SIZES = st.dictionaries(st.text("abc/", min_size=1), st.integers(0, 10**12))


@hypothesis.given(SIZES, st.integers(1, 9))
def test_shares_hold_every_file_once_and_about_the_same_work(sizes, num_shares):
    shares = manifest.deal(sizes, num_shares)
    assert len(shares) == num_shares
    assert sorted(path for share in shares for path in share) == sorted(sizes)
    work = [sum(sizes[path] + (1 << 20) for path in share) for share in shares]
    largest = max(sizes.values(), default=0) + (1 << 20)
    assert max(work) <= sum(work) / num_shares + largest
    assert shares == manifest.deal(dict(reversed(sizes.items())), num_shares)


def as_process(monkeypatch, index, count):
    """The modules believe to be process `index` of `count`."""
    facts = types.SimpleNamespace(
        process_index=lambda: index, process_count=lambda: count
    )
    monkeypatch.setattr(digests, "jax", facts)
    monkeypatch.setattr(catalog, "jax", facts)


@pytest.fixture
def folder(tmp_path):
    """Six leaves of one large and one small file each, neighbours in order."""
    for name in "abcdef":
        (tmp_path / "arrays" / name / "c").mkdir(parents=True)
        (tmp_path / "arrays" / name / "c" / "0").write_bytes(name.encode() * 3_000_000)
        (tmp_path / "arrays" / name / "zarr.json").write_text("{}")
    (tmp_path / "meta.json").write_text("{}")
    return tmp_path


def finished(folder, monkeypatch, num_processes):
    """The records of all processes, made one after another."""
    as_process(monkeypatch, 0, num_processes)
    shares = digests.deal(folder)
    records = digests.make(folder, shares)
    for process in range(1, num_processes):
        as_process(monkeypatch, process, num_processes)
        assert digests.make(folder, []) == {}
    as_process(monkeypatch, 0, num_processes)
    return records | digests.collect(folder, shares)


def test_any_number_of_processes_makes_the_manifest_of_one(folder, monkeypatch):
    want = finished(folder, monkeypatch, 1)
    assert len(want) == 13 and want["arrays/a/c/0"][0] == 3_000_000
    before = list(manifest.sizes(folder))
    for num_processes in (2, 3, 20):
        assert finished(folder, monkeypatch, num_processes) == want
        assert list(manifest.sizes(folder)) == before
    assert manifest.write(folder, 5, {}, want) == 18_000_014
    content, wrong = manifest.read(folder, 5)
    assert not wrong and content["format"] == 1
    assert manifest.check_digests(folder, content) == []


def test_records_that_are_not_those_of_the_share_fail(folder, monkeypatch):
    as_process(monkeypatch, 0, 2)
    shares = digests.deal(folder)
    with pytest.raises(FileNotFoundError):
        digests.collect(folder, shares)
    for wrong in ({}, dict.fromkeys(shares[0], [1, ""])):
        (folder / "digests.1.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="process 1 digested"):
            digests.collect(folder, shares)


@pytest.mark.parametrize("change", ["appears", "goes", "grows"])
def test_a_file_that_changes_after_the_digests_prevents_the_manifest(folder, change):
    files = manifest.flush(folder, list(manifest.sizes(folder)))
    path = folder / "arrays" / "d" / "zarr.json"
    if change == "appears":
        path = path.with_name("late.json")
        path.write_text("")
    elif change == "goes":
        path.unlink()
    else:
        path.write_text("{} ")
    with pytest.raises(RuntimeError, match=f"1 files appeared.*arrays/d/{path.name}"):
        manifest.write(folder, 5, {}, files)
    assert not (folder / manifest.NAME).exists()


def test_processes_that_verify_read_about_the_same_bytes(
    folder, tmp_path_factory, monkeypatch
):
    """Neighbours in the order of names are a large and a small file."""
    files = manifest.flush(folder, list(manifest.sizes(folder)))
    manifest.write(folder, 7, {}, files)
    top = tmp_path_factory.mktemp("checkpoints")
    folder.rename(steps.path(top, 7))
    read, real = [], manifest.digest

    def digest(path, **kwargs):
        size, text = real(path, **kwargs)
        read[-1].append((path, size))
        return size, text

    monkeypatch.setattr(manifest, "digest", digest)
    monkeypatch.setattr(catalog.agree, "gather", lambda tag, value, limit: [value])
    for process in range(2):
        as_process(monkeypatch, process, 2)
        read.append([])
        looking = catalog.Catalog(top, iter("abc"), print, 1.0)
        assert looking.inspect(7, verify=True)[1] == ""
    paths = [path for one in read for path, _ in one]
    assert len(paths) == len(set(paths)) == 13
    for one in read:
        assert 9_000_000 <= sum(size for _, size in one) < 9_001_000
