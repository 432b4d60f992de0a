# SPDX-License-Identifier: Apache-2.0
"""A damaged checkpoint is never restored silently, and an older one takes its place."""

import json
import os
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.checkpoint import manager, manifest, steps


def tree_of(step):
    rng = np.random.default_rng(step)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(40, 50)), jnp.float32)},
        "mu": jnp.asarray(rng.normal(size=(40, 50)), jnp.bfloat16),
        "step": jnp.int32(step),
    }


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(
            (a["params"]["w"], a["mu"], a["step"]),
            (b["params"]["w"], b["mu"], b["step"]),
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two finished steps, 10 and 20; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved")
    with manager.Manager(folder) as m:
        for step in (10, 20):
            m.save(step, tree_of(step), {"n": step}, local={"at": step}, wait=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files_of(folder, step):
    top = steps.path(folder, step)
    return sorted(p for p in top.rglob("*") if p.is_file())


def flip(path, bit):
    with open(path, "r+b", buffering=0) as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def expect_fallback(folder, *words):
    """Step 20 is passed over with a notice holding `words`; step 10 comes back."""
    said = []
    with manager.Manager(folder, say=said.append) as m:
        tree, meta = m.restore(tree_of(0))
        assert meta["step"] == 10 and same(tree, tree_of(10))
        assert m.all_steps() == [10]
    (notice,) = said
    assert "step 20" in notice and "the next older one is step 10" in notice
    for word in words:
        assert word in notice


def test_a_flipped_bit_in_any_file_falls_back_and_names_the_file(folder):
    rng = random.Random(0)
    for path in files_of(folder, 20):
        whole = path.read_bytes()
        flip(path, rng.randrange(len(whole) * 8))
        expect_fallback(folder, path.name)
        path.write_bytes(whole)
    with manager.Manager(folder) as m:  # put back together, it is good again
        assert m.restore(tree_of(0))[1]["step"] == 20


def test_a_thousand_flips_are_all_seen(folder):
    """Chosen half by size and half by file, the manifest's own bytes included."""
    rng = random.Random(1)
    top = steps.path(folder, 20)
    files = files_of(folder, 20)
    sizes = [p.stat().st_size for p in files]
    for i in range(1000):
        path = rng.choices(files, sizes)[0] if i % 2 else rng.choice(files)
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        content, wrong = manifest.read(top, 20)
        if content is not None:
            (wrong,) = manifest.check_digests(
                top, content, [path.relative_to(top).as_posix()]
            )
        assert path.name in wrong, (path, bit)
        flip(path, bit)
    assert manifest.check_digests(top, manifest.read(top, 20)[0]) == []


def test_truncated_missing_and_torn_files_are_named(folder):
    rng = random.Random(2)
    for path in files_of(folder, 20):
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
        expect_fallback(folder, path.name)
        path.unlink()
        expect_fallback(folder, path.name, "missing")
        path.write_bytes(whole)
    big = max(files_of(folder, 20), key=lambda p: p.stat().st_size)
    old = steps.path(folder, 10) / big.relative_to(steps.path(folder, 20))
    torn = bytearray(big.read_bytes())
    torn[4096:8192] = old.read_bytes()[4096:8192]
    assert len(torn) == big.stat().st_size
    big.write_bytes(torn)  # a page of the step before
    expect_fallback(folder, big.name, "has changed")


def test_a_missing_file_is_known_before_restoring(folder):
    files_of(folder, 20)[3].unlink()
    with manager.Manager(folder) as m:
        assert m.latest() == 10


def test_links_out_of_a_step_and_paths_above_it_are_never_read(folder, tmp_path):
    """A folder from somebody else: an array's folder leads to another of this machine,
    whose files are the right ones, sizes and digests included."""
    top = steps.path(folder, 20)
    leaf, away = top / "arrays/params.w", tmp_path / "away"
    shutil.move(leaf, away)
    leaf.symlink_to(away, target_is_directory=True)
    expect_fallback(folder, "params.w is a link out of the checkpoint")
    leaf.unlink()
    shutil.move(away, leaf)
    (top / "arrays/root").symlink_to("/", target_is_directory=True)
    expect_fallback(folder, "root is a link out of the checkpoint")
    (top / "arrays/root").unlink()
    inside = top / "arrays/mu"  # to another place of the same step: nothing leaks
    shutil.move(inside, top / "arrays/moved")
    inside.symlink_to("moved", target_is_directory=True)
    with manager.Manager(folder) as m:
        assert same(m.restore(tree_of(0))[0], tree_of(20))
    content = manifest.read(top, 20)[0]
    for path in ("/etc/hostname", "../10/manifest.json"):
        content["files"] = {path: [1, ""]}
        for check in (manifest.check_sizes, manifest.check_digests):
            assert check(top, content) == [
                f"{path} is not a path inside of the checkpoint"
            ]


def test_files_swapped_between_steps_are_seen(folder):
    new, old = (steps.path(folder, s) for s in (20, 10))
    leaf = "arrays/params.w/c/0/0"
    assert (new / leaf).stat().st_size == (old / leaf).stat().st_size
    spare = folder / "spare"
    for a, b, word in [
        (new / leaf, old / leaf, leaf),
        (new / "arrays", old / "arrays", "has changed"),
        (new / "manifest.json", old / "manifest.json", "belongs to step 10"),
        (new, old, "belongs to step 10"),
    ]:
        for x, y in ((a, spare), (b, a), (spare, b)):
            os.rename(x, y)
        with manager.Manager(folder) as m:
            with pytest.raises(config.InputError) as caught:
                m.restore(tree_of(0))
            assert "no intact checkpoint" in str(caught.value)
            assert word in str(caught.value)
        for x, y in ((a, spare), (b, a), (spare, b)):
            os.rename(x, y)
    with manager.Manager(folder) as m:
        assert m.restore(tree_of(0))[1]["step"] == 20


def test_a_damaged_step_asked_for_by_number_is_an_error(folder):
    flip(steps.path(folder, 20) / "arrays/mu/c/0/0", 99)
    with manager.Manager(folder) as m:
        with pytest.raises(config.InputError, match="step 20 .* damaged.*mu/c/0/0"):
            m.restore(tree_of(0), 20)
        assert m.restore(tree_of(0), 10)[1]["step"] == 10


def test_without_verifying_an_unreadable_step_still_falls_back(folder, monkeypatch):
    """Orbax's own failure is imitated: after a real one its coroutines leak."""
    real = manager.arrays.read

    def read(path, abstract):
        if path.parent.name == "00000020":
            raise ValueError("zarr: bad metadata")
        return real(path, abstract)

    monkeypatch.setattr(manager.arrays, "read", read)
    said = []
    with manager.Manager(folder, say=said.append) as m:
        facts = steps.path(folder, 20) / "arrays/mu/zarr.json"
        facts.write_bytes(facts.read_bytes().replace(b"zarr", b"rraz"))
        tree, meta = m.restore(tree_of(0), verify=False)
        assert meta["step"] == 10 and same(tree, tree_of(10))
    assert "arrays/mu/zarr.json has changed" in said[0]


def test_an_error_that_is_not_the_files_fault_is_raised_as_it_is(folder, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError("too big")

    monkeypatch.setattr(manager.arrays, "read", out_of_memory)
    with manager.Manager(folder) as m:
        with pytest.raises(MemoryError, match="too big"):
            m.restore(tree_of(0))
        assert m.all_steps() == [10, 20]


def test_damaged_facts_are_not_believed(folder):
    meta = steps.path(folder, 20) / "meta.json"
    meta.write_text(meta.read_text().replace("20", "30"))
    with manager.Manager(folder) as m:
        assert m.latest() == 20  # sizes agree; the digests are read when asked
        with pytest.raises(config.InputError, match="meta.json has changed"):
            m.read_meta()


def test_the_newest_intact_step_is_known_before_compiling_and_read_once(
    folder, monkeypatch
):
    flip(steps.path(folder, 20) / "arrays/mu/c/0/0", 5)
    said, reads, real = [], [], manifest.digest
    monkeypatch.setattr(
        manifest, "digest", lambda path, **kw: (reads.append(path), real(path, **kw))[1]
    )
    with manager.Manager(folder, say=said.append) as m:
        assert m.newest_intact() == 10 == m.latest() and len(said) == 1
        num_reads = len(reads)
        assert m.restore(tree_of(0))[1]["step"] == 10
        assert len(reads) == num_reads and len(said) == 1


def test_a_damaged_step_is_replaced_when_training_reaches_it_again(folder):
    flip(steps.path(folder, 20) / "arrays/mu/c/0/0", 5)
    with manager.Manager(folder, say=lambda text: None) as m:
        assert m.newest_intact() == 10
        m.save(20, tree_of(21), {}, wait=True)
        assert m.all_steps() == [10, 20]
        assert same(m.restore(tree_of(0))[0], tree_of(21))


def test_damaged_steps_do_not_count_as_kept_and_go_when_newer_ones_stand(folder):
    flip(steps.path(folder, 20) / "manifest.json", 800)
    with manager.Manager(folder, keep=2) as m:
        m.save(30, tree_of(30), {}, wait=True)
        assert m.all_steps() == [10, 30]
        m.save(40, tree_of(40), {}, wait=True)
        assert m.all_steps() == [30, 40] == steps.present(folder)


def test_a_manifest_of_a_later_format_is_named(folder):
    path = steps.path(folder, 20) / "manifest.json"
    content = json.loads(path.read_text())["content"] | {"format": 2}
    digest = manifest._content_digest(content)
    path.write_text(json.dumps({"content": content, "sha256": digest}))
    assert steps.problem(folder, 20) == "manifest.json has format 2, this code reads 1"
    path.write_text(json.dumps([1]))
    assert "unreadable" in steps.problem(folder, 20)
