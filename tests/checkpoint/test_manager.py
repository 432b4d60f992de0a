# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back: every bit, on every mesh, whatever happens to the leaves.

The oracle of exactness is the raw bytes of the host copy, never a float comparison.
"""

import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import config
from qwen_jax.checkpoint import arrays, manager, saving, steps

DTYPES = [
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "complex64"),
    *("int32", "uint32", "int8", "uint8", "int4", "bool"),
]


def mesh_of(*sizes):
    names = ("data", "fsdp", "tensor")[: len(sizes)]
    return jax.make_mesh(sizes, names, devices=jax.devices()[: int(np.prod(sizes))])


def raw(x):
    """The leaf's bytes on the host, with shape and dtype."""
    x = np.asarray(x)
    if x.dtype == jnp.int4:
        return x.shape, str(x.dtype), x.astype(np.int8).tobytes()
    return x.shape, str(x.dtype), x.tobytes()


def random_bits(dtype, shape, seed):
    """Every bit pattern may occur: NaN payloads, -0.0, infinities, denormals."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_ or dtype == jnp.int4:
        return rng.integers(0, 2 if dtype == jnp.bool_ else 7, shape).astype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


def training_like(mesh, seed=0):
    """A tree with what a training state holds: matrices, moments, counts, keys."""
    specs = {"q": P("data", "fsdp"), "o": P("fsdp"), "norm": P()}
    shapes = {"q": (8, 16), "o": (16, 8), "norm": (16,)}

    def put(name, dtype, s):
        bits = random_bits(dtype, shapes[name], s)
        return jax.device_put(bits, NamedSharding(mesh, specs[name]))

    params = {k: put(k, "float32", seed + i) for i, k in enumerate(shapes)}
    mu = {k: put(k, "bfloat16", seed + 9 + i) for i, k in enumerate(shapes)}
    scalar = NamedSharding(mesh, P())
    return {
        "params": params,
        "opt": ({"mu": mu, "count": jax.device_put(jnp.int32(seed), scalar)}, None),
        "key": jax.device_put(jax.random.PRNGKey(seed), scalar),
    }


def abstract(tree, mesh=None):
    def leaf(x):
        sharding = x.sharding
        if mesh is not None:
            names = [n if n in mesh.axis_names else None for n in sharding.spec]
            sharding = NamedSharding(mesh, P(*names))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert raw(a) == raw(b)


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("compress", [False, True])
def test_every_dtype_keeps_every_bit(tmp_path, ocdbt, compress):
    mesh = mesh_of(2, 2)
    tree = {}
    for i, dtype in enumerate(DTYPES):
        for shape, spec in {
            (8, 4): P("data", "fsdp"),
            (4,): P("fsdp"),
            (): P(),
        }.items():
            value = random_bits(dtype, shape, 10 * i + len(shape))
            tree[f"{dtype}{len(shape)}"] = jax.device_put(
                value, NamedSharding(mesh, spec)
            )
    want = jax.tree.map(raw, tree)
    with manager.Manager(tmp_path, ocdbt=ocdbt, compress=compress) as m:
        m.save(1, tree, {}, wait=True)
        got, meta = m.restore(abstract(tree))
    assert jax.tree.map(raw, got) == want
    assert meta == {"step": 1}
    for name, leaf in got.items():
        assert leaf.sharding == tree[name].sharding


def test_host_leaves_come_back_as_they_were(tmp_path):
    tree = {
        "int64": np.arange(5, dtype=np.int64) << 40,
        "float64": np.float64(1) / 3,
        "array": np.array([[1.5, -0.0]], np.float32),
        "number": 7,
        "real": 0.1,
        "flag": True,
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "nothing": None,
    }
    with manager.Manager(tmp_path) as m:
        m.save(0, tree, {}, wait=True)
        got, _ = m.restore(tree)
    for name in ("int64", "float64", "array", "empty"):
        assert raw(got[name]) == raw(tree[name])
    for name in ("number", "real", "flag", "nothing"):
        assert got[name] == tree[name] and type(got[name]) is type(tree[name])


def test_a_bare_array_and_odd_key_names_are_leaves(tmp_path):
    with manager.Manager(tmp_path) as m:
        m.save(0, jnp.arange(3), {}, wait=True)
        assert raw(m.restore(jnp.zeros(3, jnp.int32))[0]) == raw(jnp.arange(3))
        odd = {"a/b": jnp.ones(2), "ü x": jnp.arange(2.0), "a.b": jnp.zeros(2)}
        m.save(1, odd, {}, wait=True)
        assert_same(m.restore(odd)[0], odd)


def test_two_leaves_of_one_name_and_unsavable_leaves_are_refused(tmp_path):
    with manager.Manager(tmp_path) as m:
        for bad, word in [
            ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, "a.b"),
            ({"manifest.ocdbt": jnp.ones(1)}, "reserved"),
            ({"../x": jnp.ones(1)}, "reserved"),
            ({"x": "text"}, "x is a str"),
            ({"k": jax.random.key(0)}, "key_data"),
        ]:
            with pytest.raises(config.InputError, match=word):
                m.save(0, bad, {})
        with pytest.raises(config.InputError, match="not JSON"):
            m.save(0, jnp.ones(1), {"array": jnp.ones(1)})
        with pytest.raises(config.InputError, match="meta has step 3"):
            m.save(0, jnp.ones(1), {"step": 3})
        with pytest.raises(config.InputError, match="0 or more"):
            m.save(-1, jnp.ones(1), {})
        assert m.all_steps() == []


def test_a_chain_of_meshes_keeps_the_bits(tmp_path):
    tree = training_like(mesh_of(1, 1))
    want = jax.tree.map(raw, tree)
    with manager.Manager(tmp_path) as m:
        for step, sizes in enumerate([(1, 1), (2, 2), (8, 1), (1, 4), (4, 2), (1, 1)]):
            m.save(step, tree, {}, wait=True)
            mesh = mesh_of(*sizes)
            tree, _ = m.restore(abstract(tree, mesh))
            assert jax.tree.map(raw, tree) == want
            assert tree["params"]["q"].sharding.mesh.shape == mesh.shape


def test_meta_and_local_facts_come_back(tmp_path):
    meta = {"config": {"a": [1, 2], "b": None}, "metrics": {"loss": 1 / 3}}
    with manager.Manager(tmp_path) as m:
        m.save(5, jnp.ones(2), meta, local={"position": 12}, wait=True)
        _, got = m.restore(jnp.ones(2))
        assert got == {**meta, "step": 5, "local": [{"position": 12}]}
        assert m.read_meta() == m.read_meta(5) == got
        with pytest.raises(config.InputError, match="step 4 .*steps there: 5"):
            m.read_meta(4)


def test_donated_and_overwritten_leaves_do_not_reach_the_files(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    mesh = mesh_of(2, 4)
    with manager.Manager(tmp_path, keep=9) as m:
        wanted = []
        for step in range(6):
            x = jax.device_put(
                np.full((512, 1024), step, np.float32), NamedSharding(mesh, P("data"))
            )
            host = np.full(1000, step)
            m.save(step, {"x": x, "host": host}, {})
            x = overwrite(x)
            host[:] = -1
            wanted.append(step)
            jax.block_until_ready(x)
        m.wait()
        like = {"x": abstract(x), "host": host}
        for step in wanted:
            got, _ = m.restore(like, step)
            assert (np.asarray(got["x"]) == step).all()
            assert (got["host"] == step).all()


def test_saving_compiles_nothing(tmp_path, caplog):
    """Replicated leaves included: a compile there would block the training loop."""
    mesh = mesh_of(4, 2)
    tree = {
        "replicated": jax.device_put(jnp.ones((64, 48)), NamedSharding(mesh, P())),
        "half": jax.device_put(jnp.ones((64, 40)), NamedSharding(mesh, P("fsdp"))),
    }
    with jax.log_compiles(), manager.Manager(tmp_path) as m:
        jax.jit(lambda x: x + 3)(jnp.ones(3))
        assert "Compiling" in caplog.text
        caplog.clear()
        m.save(1, tree, {}, wait=True)
        assert "Compiling" not in caplog.text


def test_a_restored_tree_can_be_donated_while_it_is_saved_again(tmp_path):
    update = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    tree = {"x": jnp.zeros((256, 256)), "n": jnp.int32(0)}
    with manager.Manager(tmp_path, keep=99) as m:
        m.save(0, tree, {}, wait=True)
        for step in range(1, 5):
            tree, _ = m.restore(tree)
            tree = update(tree)
            m.save(step, tree, {})
            tree = update(tree)
            m.wait()
        for step in range(5):
            got, _ = m.restore(tree, step)
            assert int(got["n"]) == step and (np.asarray(got["x"]) == step).all()


def test_a_subset_restores_and_reads_only_its_files(tmp_path):
    tree = training_like(mesh_of(2, 2))
    with manager.Manager(tmp_path) as m:
        m.save(1, tree, {}, wait=True)
        part = {"params": abstract(tree["params"])}
        with pytest.raises(config.InputError, match="in the checkpoint but not wanted"):
            m.restore(part)
        assert_same(m.restore(part, subset=True)[0], {"params": tree["params"]})
    # Damage to the optimizer's files does not keep the parameters from being used, but
    # as a checkpoint to go on from the step is gone.
    (victim,) = (steps.path(tmp_path, 1) / "arrays" / "opt.0.mu.o").rglob("c/1/0")
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    with manager.Manager(tmp_path, say=lambda text: None) as m:
        assert_same(m.restore(part, subset=True)[0], {"params": tree["params"]})
        with pytest.raises(config.InputError, match="opt.0.mu.o/c/1/0 has changed"):
            m.restore(abstract(tree))


def test_leaves_that_do_not_fit_are_listed_before_any_array_is_read(
    tmp_path, monkeypatch
):
    tree = training_like(mesh_of(1, 1))
    like = abstract(tree)
    like["params"]["q"] = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    like["params"]["norm"] = jax.ShapeDtypeStruct((16,), jnp.bfloat16)
    like["params"]["extra"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    del like["params"]["o"]
    with manager.Manager(tmp_path) as m:
        m.save(1, tree, {}, wait=True)
        monkeypatch.setattr(arrays, "read", lambda *_: pytest.fail("arrays were read"))
        with pytest.raises(config.InputError) as caught:
            m.restore(like)
    text = str(caught.value)
    assert "4 leaves differ" in text
    assert "params.q: float32[8, 16] in the checkpoint, float32[8, 32] wanted" in text
    assert "params.norm: float32[16] in the checkpoint, bfloat16[16] wanted" in text
    assert "params.extra: missing in the checkpoint" in text
    assert "params.o: in the checkpoint but not wanted" in text


def test_nothing_to_restore_says_so(tmp_path):
    with manager.Manager(tmp_path / "new") as m:
        assert m.latest() is None
        with pytest.raises(config.InputError, match="no intact checkpoint in"):
            m.restore(jnp.ones(1))
        with pytest.raises(config.InputError, match="no intact checkpoint in"):
            m.read_meta()
        m.save(3, jnp.ones(1), {}, wait=True)
        with pytest.raises(config.InputError, match="no checkpoint of step 4 .* 3"):
            m.restore(jnp.ones(1), 4)


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(config.InputError, match="keep=0"):
        manager.Manager(tmp_path, keep=0)


def test_saving_is_asynchronous_and_only_one_save_is_in_flight(tmp_path, monkeypatch):
    """latest() may not name a step before its save has ended."""
    gate, real = threading.Event(), saving.steps.commit
    monkeypatch.setattr(
        saving.steps, "commit", lambda *args: (gate.wait(30), real(*args))
    )
    with manager.Manager(tmp_path) as m:
        m.save(1, jnp.ones(4), {})
        time.sleep(0.2)
        m.check()
        assert m.latest() is None and not steps.present(tmp_path)
        second = threading.Thread(target=m.save, args=(2, jnp.ones(4), {}))
        second.start()
        time.sleep(0.2)
        assert second.is_alive()
        gate.set()
        second.join()
        m.wait()
        assert m.all_steps() == [1, 2]
        assert m.last_save.step == 2 and m.last_save.bytes > 16


def test_a_read_only_manager_touches_nothing_and_sees_new_steps(tmp_path):
    with manager.Manager(tmp_path) as writer:
        leftover = steps.temporary(tmp_path, 7)
        leftover.mkdir()
        with manager.Manager(tmp_path, read_only=True) as reader:
            assert leftover.exists() and reader.latest() is None
            assert os.listdir(tmp_path) == ["tmp.7"]
            writer.save(1, jnp.arange(3), {}, wait=True)
            assert reader.latest() == 1
            assert raw(reader.restore(jnp.zeros(3, jnp.int32))[0]) == raw(jnp.arange(3))
            with pytest.raises(config.InputError, match="read-only"):
                reader.save(2, jnp.ones(1), {})
    assert manager.Manager(tmp_path / "none", read_only=True).all_steps() == []
    assert not (tmp_path / "none").exists()


def test_steps_newer_than_the_one_gone_on_from_can_be_dropped(tmp_path):
    with manager.Manager(tmp_path, keep=9) as m:
        for step in (10, 20, 30):
            m.save(step, jnp.full(2, step), {}, wait=True)
        assert m.drop_after(10) == [30, 20]
        assert m.all_steps() == steps.present(tmp_path) == [10]


def test_a_step_can_be_written_again(tmp_path):
    with manager.Manager(tmp_path) as m:
        m.save(1, jnp.zeros(3), {"try": 1}, wait=True)
        m.save(1, jnp.ones(3), {"try": 2}, wait=True)
        got, meta = m.restore(jnp.zeros(3))
        assert np.asarray(got).tolist() == [1, 1, 1] and meta["try"] == 2
        assert m.all_steps() == [1]


def test_it_works_below_a_running_event_loop(tmp_path):
    """A notebook's cell runs inside a loop, where a second one may not be started."""
    import asyncio

    async def cell():
        with manager.Manager(tmp_path) as m:
            m.save(1, jnp.arange(3), {}, wait=True)
            return m.restore(jnp.zeros(3, jnp.int32))[0]

    assert raw(asyncio.run(cell())) == raw(jnp.arange(3))


def test_the_terminal_stays_quiet(tmp_path, capfd):
    with manager.Manager(tmp_path) as m:
        m.save(1, training_like(mesh_of(2, 2)), {}, wait=True)
        m.restore(abstract(training_like(mesh_of(2, 2))))
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_the_manifest_and_meta_are_plain_json(tmp_path):
    with manager.Manager(tmp_path) as m:
        m.save(2, {"w": jnp.ones((2, 3), jnp.bfloat16)}, {"a": 1}, wait=True)
    folder = steps.path(tmp_path, 2)
    content = json.loads((folder / "manifest.json").read_text())["content"]
    assert content["leaves"] == {"w": ["bfloat16", [2, 3]]} and content["step"] == 2
    on_disk = {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    }
    assert on_disk == set(content["files"]) | {"manifest.json"}
    assert json.loads((folder / "meta.json").read_text()) == {"a": 1, "step": 2}
