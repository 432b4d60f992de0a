# SPDX-License-Identifier: Apache-2.0
"""The container of GGUF files: equal to the package's reading, and believed in nothing.

Damaged files are made from a whole one, byte by byte and at random. Whatever is in a
file, it is read or refused with InputError, and memory stays near the file's size.
"""

import math
import random
import struct
import tracemalloc

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.models import gguf, gguf_file

package = pytest.importorskip("gguf")
pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests import ggufs  # noqa: E402 (it needs the three)

Kind = package.GGMLQuantizationType


def vocabulary(writer):
    ggufs.add_tokenizer(writer, merges=[("a", "b"), ("ab", "c")])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A whole small model with a tokenizer, two types of weights, an odd fact each."""
    made = ggufs.model("qwen2", num_hidden_layers=1, vocab_size=272)
    weights = ggufs.tensors(made, "qwen2")
    kinds = {"blk.0.ffn_up.weight": Kind.Q4_0, "blk.0.ffn_down.weight": Kind.F16}

    def odd(writer):
        writer.add_array("odd.numbers", [1, -2, 3])
        writer.add_array("odd.floats", [0.5, 1.5])
        writer.add_bool("odd.true", True)
        writer.add_int64("odd.long", -(2**40))
        writer.add_float64("odd.double", math.pi)
        writer.add_uint8("odd.byte", 255)

    out = tmp_path_factory.mktemp("gguf") / "model.gguf"
    facts = [vocabulary, odd]
    ggufs.write(out, "qwen2", weights, made.config, facts=facts, kinds=kinds)
    return out


def test_it_says_what_the_package_reads(path):
    header = gguf_file.read(path)
    theirs = package.GGUFReader(path)
    facts = {k: f.contents() for k, f in theirs.fields.items() if k[:5] != "GGUF."}
    assert header.facts.keys() == facts.keys()
    for key, value in facts.items():
        ours = header.facts[key]
        assert (list(ours) if isinstance(value, list) else ours) == value, key
    assert list(header.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.type.name == tensor.tensor_type.name
        assert (ours.start, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_other_alignments(tmp_path):
    made = ggufs.model("qwen2", num_hidden_layers=1)
    weights = ggufs.tensors(made, "qwen2")
    wide = [lambda w: w.add_custom_alignment(256)]
    ggufs.write(tmp_path / "a.gguf", "qwen2", weights, made.config, facts=wide)
    _, params = gguf.load(tmp_path / "a.gguf")
    np.testing.assert_array_equal(params["embed_vd"], weights["token_embd.weight"])
    starts = [t.start for t in gguf_file.read(tmp_path / "a.gguf").tensors.values()]
    assert {start % 256 for start in starts} == {0}


# --- files that lie ---


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def container(facts=(), tensors=(), data=b"", *, version=3, counts=None):
    """A file by hand: facts [(key, kind, bytes)], tensors [(name, dims, type, at)]."""
    num_tensors, num_facts = counts or (len(tensors), len(facts))
    out = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_facts)
    for key, kind, value in facts:
        out += text(key) + struct.pack("<I", kind) + value
    for name, dims, kind, at in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", kind, at)
    return out + b"\0" * (-len(out) % 32) + data


U32, STRING, LIST = 4, 8, 9
ALIGN = "general.alignment"
LIES = {
    "empty": (b"", "begins with b''"),
    "a pickle": (b"\x80\x04\x95", "is no GGUF file"),
    "magic alone": (b"GGUF", "the version needs 4 bytes and 0 are left"),
    "version 1": (container(version=1), "GGUF version 1; versions 2 and 3"),
    "big-endian": (b"GGUF" + b"\0\0\0\3" + b"\0" * 16, "GGUF version 50331648"),
    "many tensors": (container(counts=(2**63, 0)), "9,223,372,036,854,775,808 tensors"),
    "some tensors": (container(counts=(9, 0)), "9 tensors do not fit in the"),
    "many facts": (container(counts=(0, 65_537)), "65,537 key-value pairs; at most"),
    "a long key": (
        container([("k" * 65_536, U32, b"\0" * 4)]),
        "a key has 65,536 bytes",
    ),
    "a long text": (
        container([("k", STRING, struct.pack("<Q", 2**64 - 1))]),
        "has 18,446,744,073,709,551,615 bytes; at most 1,048,576",
    ),
    "text beyond the end": (
        container([("k", STRING, struct.pack("<Q", 1000))]),
        "the value of 'k' needs 1,000 bytes and",
    ),
    "not UTF-8": (container([("k", STRING, text(b"\xff"))]), "is not UTF-8 text"),
    "a key twice": (container([("k", U32, b"\0" * 4)] * 2), "the key 'k' comes twice"),
    "an unknown kind": (container([("k", 13, b"\0" * 8)]), "of the unknown kind 13"),
    "lists of lists": (
        container([("k", LIST, struct.pack("<IQ", LIST, 1) + b"\0" * 12)]),
        "an array of the kind 9",
    ),
    "a list that wraps": (
        container([("k", LIST, struct.pack("<IQ", 10, 2**61))]),
        "2,305,843,009,213,693,952 numbers in",
    ),
    "a list of many texts": (
        container([("k", LIST, struct.pack("<IQ", STRING, 2**21 + 1))]),
        "2,097,153 texts in the value of 'k'; at most 2,097,152",
    ),
    "alignment 0": (container([(ALIGN, U32, struct.pack("<I", 0))]), "power of two"),
    "alignment 24": (container([(ALIGN, U32, struct.pack("<I", 24))]), "power of two"),
    "alignment as text": (container([(ALIGN, STRING, text("32"))]), "power of two"),
    "no dims": (container(tensors=[("t", (), 0, 0)]), "'t' has 0 dims; wanted 1 to 4"),
    "five dims": (container(tensors=[("t", (1,) * 5, 0, 0)], data=b"\0" * 4), "5 dims"),
    "a dim of 0": (container(tensors=[("t", (4, 0), 0, 0)]), "wanted none to be 0"),
    "an unknown type": (
        container(tensors=[("t", (4,), 4, 0)], data=b"\0" * 32),
        "ggml's type 4, which is not read; convert the model to one of F32, F16, Q4_0",
    ),
    "a broken block": (
        container(tensors=[("t", (33,), 8, 0)], data=b"\0" * 99),
        "rows of 33 weights, which is no multiple of the 32 of Q8_0",
    ),
    "off the grid": (
        container(tensors=[("t", (1,), 0, 4)], data=b"\0" * 99),
        "off the grid of 32",
    ),
    "beyond the end": (
        container(tensors=[("t", (25,), 0, 0)], data=b"\0" * 96),
        "beyond the end of the file",
    ),
    "an offset that wraps": (
        container(tensors=[("t", (8,), 0, 2**64 - 32)], data=b"\0" * 64),
        "beyond the end of the file",
    ),
    "dims that wrap": (
        container(tensors=[("t", (2**32, 2**32), 0, 0)], data=b"\0" * 64),
        "beyond the end of the file",
    ),
    "shared bytes": (
        container(tensors=[("t", (8,), 0, 0), ("u", (8,), 0, 0)], data=b"\0" * 64),
        "'u' shares bytes with another tensor",
    ),
    "a tensor twice": (
        container(tensors=[("t", (8,), 0, 0), ("t", (8,), 0, 32)], data=b"\0" * 64),
        "the tensor 't' comes twice",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused(name, tmp_path):
    data, told = LIES[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(config.InputError) as error:
        gguf_file.read(tmp_path / "x.gguf")
    assert told in str(error.value) and "x.gguf" in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(config.InputError, match="cannot be read: No such file"):
        gguf.load(tmp_path / "absent.gguf")


def test_memory_stays_near_the_size_of_the_file(tmp_path):
    """The most that each byte of a file can be made to take."""
    number = struct.pack("<I", 0)
    count = 40_000
    worst = {
        "short texts": [(STRING, count, text("ab") * count)],
        "no texts": [(STRING, count, text("") * count)],
        "bytes": [(0, 2**20, b"\1" * 2**20)],
        "many lists": [(0, 1, b"\1")] * 2_000,
    }
    path = tmp_path / "x.gguf"
    for name, lists in worst.items():
        facts = [
            (f"{i}", LIST, struct.pack("<IQ", kind, n) + data)
            for i, (kind, n, data) in enumerate(lists)
        ]
        path.write_bytes(container([*facts, ("last", 13, number)]))
        tracemalloc.start()
        with pytest.raises(config.InputError, match="unknown kind 13"):
            gguf_file.read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        limit = 2 * path.stat().st_size + 400 * len(lists) + 200_000
        assert peak < limit, f"{name}: {peak:,} bytes"


# --- random damage ---


def mutant(whole, draw, header_bytes):
    """The file with one to three things wrong, most of them before the weights."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(("byte", "byte", "u64", "u32", "cut", "drop", "double"))
        near = min(header_bytes, len(data)) if draw.random() < 0.9 else len(data)
        at = draw.randrange(max(near, 1))
        if kind == "byte" and data:
            data[at] = draw.randrange(256)
        elif kind in ("u64", "u32"):
            width = int(kind[1:]) // 8
            edges = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), 255)
            value = draw.choice(edges) % 2 ** (8 * width)
            data[at : at + width] = value.to_bytes(width, "little")
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw.randint(1, 64)]
        else:
            data[at:at] = data[at : at + draw.randint(1, 64)]
    return bytes(data)


def fuzz(path, scratch, count, seed):
    whole = path.read_bytes()
    header_bytes = min(t.start for t in gguf_file.read(path).tensors.values())
    draw = random.Random(seed)
    read = 0
    for number in range(count):
        scratch.write_bytes(mutant(whole, draw, header_bytes))
        for what in (gguf.load, gguf.tokenizer, gguf.template):
            try:
                what(scratch)
                read += 1
            except config.InputError as error:
                assert len(str(error)) < 3000, (seed, number)
            except Exception as error:
                error.add_note(f"seed {seed}, mutant {number}, {what.__name__}")
                raise
    return read / count


def test_random_damage_is_read_or_refused(path, tmp_path):
    share = fuzz(path, tmp_path / "x.gguf", 300, seed=1)
    assert 0.05 < share < 2.5  # of three: some of both


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_times(path, tmp_path):
    for seed in range(2, 12):
        fuzz(path, tmp_path / "x.gguf", 1000, seed)
