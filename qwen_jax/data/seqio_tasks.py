# SPDX-License-Identifier: Apache-2.0
"""SeqIO tasks and mixtures as sources: each task's split becomes a jsonl file once.

`sources("mixture_name", folder, module="my.tasks")` runs every task of a registered
mixture (or the one task) through SeqIO's own preprocessors and gives SourceConfigs,
with the mixture's rates as weights. `vocabulary(tokenizer)` is the other direction: a
seqio.Vocabulary, so that a task's features hold this project's ids.

Deviation from SeqIO: an example is read from the file and not from tf.data, because
exact state, any process count and global shuffling need records by number. What a task
draws at random in its preprocessors is drawn once, with `seed`; use several exports
with several seeds for several draws. Packing, padding and feature converters are not
used.

Formats: `<task>-<split>-<hash of the facts>.jsonl`, each line {"text"} where
`text_feature` names a string feature, else {"tokens", "prompt_tokens"}: the ids of
"inputs" (no targets of the loss) and "targets". A vocabulary's eos at the end of
"targets" is dropped, as the loader sets its own. Rates count examples: set
DataConfig.weight_by="documents".
Invariants: the file is whole or absent; it is made anew when the facts (task, split,
features, seed, lengths, version of SeqIO) differ, never because the task's code did:
`refresh=True` does that.
Raises: InputError where seqio is not installed (extra `seqio`: 3 GB of TensorFlow), for
an unknown task (with the nearest name), a missing split or feature.
"""

import hashlib
import importlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import source, tokenizer


def _seqio() -> Any:
    try:
        return importlib.import_module("seqio")
    except ImportError as error:
        raise config.InputError(
            f"SeqIO tasks need seqio ({error}): pip install 'qwen_jax[seqio]'"
        ) from error


def sources(
    name: str,
    folder: str | os.PathLike,
    *,
    split: str = "train",
    text_feature: str = "",
    module: str = "",
    seed: int = 0,
    sequence_length: Mapping[str, int] | None = None,
    refresh: bool = False,
) -> tuple[source.SourceConfig, ...]:
    """SourceConfigs of a task or mixture; exports what is not in `folder` yet.

    Args:
      name: a name of SeqIO's task or mixture registry.
      folder: where the jsonl files are kept.
      split: the split to read; tasks of a mixture without it are left out.
      text_feature: a string feature with the document's text; "" = take the ids of
        "inputs" (if there is one) and "targets".
      module: Python module to import first, whose import registers the tasks.
      seed: for what preprocessors draw at random.
      sequence_length: {feature: ids}, for tasks whose preprocessors need it (span
        corruption); longer features are cut.
      refresh: export again although the files are there.
    """
    seqio = _seqio()
    if module:
        importlib.import_module(module)
    names = (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())
    if name not in names:
        raise config.InputError(
            f"no SeqIO task or mixture is named {name!r}{config.nearest(name, names)}; "
            "name the module that registers it, too"
        )
    found = seqio.get_mixture_or_task(name)
    mixed = isinstance(found, seqio.Mixture)
    tasks = [t for t in (found.tasks if mixed else [found]) if split in t.splits]
    if not tasks:
        raise config.InputError(
            f"SeqIO {name!r} has no split {split!r}"
            f"{config.nearest(split, found.splits)}"
        )
    facts = {
        "split": split,
        "text_feature": text_feature,
        "seed": seed,
        "sequence_length": dict(sequence_length or {}),
        "seqio": seqio.__version__,
    }
    return tuple(
        source.SourceConfig(
            path=str(_export(task, pathlib.Path(folder), facts, refresh)),
            name=task.name,
            weight=float(found.get_rate(task)) if mixed else 1.0,
            format="jsonl",
            tokens_field="" if text_feature else "tokens",
        )
        for task in tasks
    )


def _export(
    task: Any, folder: pathlib.Path, facts: Mapping[str, Any], refresh: bool
) -> pathlib.Path:
    """The jsonl file of a task, made if it is not there."""
    text = json.dumps({"task": task.name, **facts}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "_", f"{task.name}-{facts['split']}")
    path = folder / f"{stem}-{digest}.jsonl"
    if path.exists() and not refresh:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with whole.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in _lines(task, facts))
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    return path


def _lines(task: Any, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a task's examples, in the task's own order."""
    dataset = task.get_dataset(
        sequence_length=facts["sequence_length"] or None,
        split=facts["split"],
        shuffle=False,
        seed=facts["seed"],
        num_epochs=1,
    )
    feature, given = facts["text_feature"], dataset.element_spec
    wanted = [feature] if feature else ["targets"]
    missing = [one for one in wanted if one not in given]
    if missing:
        raise config.InputError(
            f"SeqIO task {task.name!r} has no feature {missing[0]!r}"
            f"{config.nearest(missing[0], given)}"
        )
    target = task.output_features.get("targets")
    end = None
    if target is not None and target.add_eos:
        end = target.vocabulary.eos_id
    for example in dataset.as_numpy_iterator():
        if feature:
            yield {"text": _text(task.name, feature, example[feature])}
            continue
        prompt = _ids(task.name, "inputs", example.get("inputs", ()))
        answer = _ids(task.name, "targets", example["targets"])
        if answer and answer[-1] == end:
            answer.pop()
        yield {"tokens": [*prompt, *answer], "prompt_tokens": len(prompt)}


def _text(task: str, feature: str, value: Any) -> str:
    if not isinstance(value, bytes):
        raise config.InputError(
            f"SeqIO task {task!r}: feature {feature!r} holds {type(value).__name__}, "
            'not text; leave text_feature empty to take the ids of "targets"'
        )
    return value.decode("utf-8", "replace")


def _ids(task: str, feature: str, value: Any) -> list[int]:
    ids = np.asarray(value)
    if ids.size and (ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer)):
        raise config.InputError(
            f"SeqIO task {task!r}: feature {feature!r} holds {ids.dtype} of {ids.ndim} "
            "dims, not ids; name the feature with the text in text_feature"
        )
    return ids.astype(np.int64).tolist()


def vocabulary(ours: tokenizer.Tokenizer) -> Any:
    """A seqio.Vocabulary with the ids of a Tokenizer (pad 0 is SeqIO's own rule)."""
    seqio = _seqio()
    tf = importlib.import_module("tensorflow")

    class QwenVocabulary(seqio.Vocabulary):
        """Byte-level BPE ids inside SeqIO features."""

        fingerprint = ours.fingerprint
        eos_id = ours.eos_id
        bos_id = unk_id = None
        _base_vocab_size = ours.vocab_size

        def _encode(self, s: str) -> list[int]:
            return ours.encode(s)

        def _decode(self, ids: list[int]) -> str:
            return ours.decode(ids, skip_special=True)

        def _encode_tf(self, s: Any) -> Any:
            def encode(text: Any) -> np.ndarray:
                # Bytes inside a graph, a 0-d array of letters outside of one.
                text = np.asarray(text).item()
                text = text.decode("utf-8", "replace") if type(text) is bytes else text
                return ours.encode_batch([text])[0]

            ids = tf.numpy_function(encode, [s], tf.int32)
            ids.set_shape([None])
            return ids

        def _decode_tf(self, ids: Any) -> Any:
            return tf.numpy_function(ours.decode_bytes, [ids], tf.string)

        def __eq__(self, other: object) -> bool:
            return getattr(other, "fingerprint", None) == self.fingerprint

        def __hash__(self) -> int:
            return hash(self.fingerprint)

    return QwenVocabulary()
