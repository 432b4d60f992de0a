# SPDX-License-Identifier: Apache-2.0
"""Documents -> global batches of packed rows, as one iterator with exact state.

`Loader` gives each process its rows of every global batch. The batches are a pure
function of (contents of the sources, tokenizer, seed, batch_rows and the DataConfig
fields named in `Loader.order`): the number of processes, workers and threads never
changes them, and a state taken with any of these resumes with any other.

Rows. A document is [end] + ids + [end]; inputs are all but the last id, targets all but
the first; a long one is cut in pieces of seq_tokens. Slot s of a batch of b rows
belongs to lane s * lanes // b. lanes = gcd(streams, batch_rows), so that every lane
gives the same number of rows and none starves.

Formats: a batch is a dict of NumPy arrays [rows, seq_tokens]: tokens_bt, targets_bt,
positions_bt, segments_bt int32 and mask_bt float32 (see packing.py). A state is JSON:
{"version", "step", "order", "lanes"}; `merge_states` joins those of all processes. The
list of broken records is JSON lines {"source", "file", "offset", "reason"}.
Invariants: state() is that of the batch returned last, whatever is read ahead; no
held-out document is ever returned.
Raises: InputError for a config that cannot work, a state of another run, a shard that
changed since the state was taken (named), and too many broken records.
"""

import json
import math
import multiprocessing
import os
import pathlib
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

from absl import flags
from grain import multiprocessing as grain_multiprocessing

from qwen_jax import config
from qwen_jax.data import files, mixture, packing, source, stream, tokenizer

_VERSION = 1
# A share of broken records is believed after this many records (or a whole epoch).
_ENOUGH_RECORDS = 100_000


DataConfig = source.DataConfig


class Loader:
    """Iterator over this process's rows of the global batches.

    Args:
      data: the config.
      vocabulary: the tokenizer.
      batch_rows: rows of the global batch.
      seed: the run's seed.
      process_index, process_count: which rows are this process's.
      sources: those of source.open_sources(data), where they are open already.
      bad_records_path: file to list broken records in (one for each process).
    """

    def __init__(
        self,
        data: DataConfig,
        vocabulary: tokenizer.Tokenizer,
        *,
        batch_rows: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        sources: Sequence[source.Source] | None = None,
        bad_records_path: str | pathlib.Path | None = None,
    ):
        if batch_rows < 1 or batch_rows % process_count:
            raise config.InputError(
                f"a batch of {batch_rows} rows for {process_count} processes: wanted a "
                "positive multiple of the number of processes"
            )
        self._data, self._bad_path = data, bad_records_path
        self.sources = tuple(sources or source.open_sources(data))
        lanes = math.gcd(data.streams, batch_rows)
        self._plan = make_plan(
            data, vocabulary, self.sources, lanes, batch_rows // lanes, seed
        )
        local_rows = batch_rows // process_count
        self._first = process_index * local_rows
        self._stop = self._first + local_rows
        per_lane = self._plan.rows_per_lane
        self._lanes = range(self._first // per_lane, -(-self._stop // per_lane))
        self._manifest = source.manifest(self.sources)
        files.Cache(data.cache_dir).keep(
            _manifest_key(self._manifest["hash"]), json.dumps(self._manifest)
        )
        self.order = {
            "manifest": self._manifest["hash"],
            "tokenizer": vocabulary.fingerprint,
            "sources": [one.name for one in self.sources],
            "seed": seed,
            "batch_rows": batch_rows,
            "streams": data.streams,
            "seq_tokens": data.seq_tokens,
            "holdout_share": data.holdout_share,
            "window_docs": data.window_docs,
            "window_bytes": self._plan.window_bytes,
            "max_record_bytes": data.max_record_bytes,
        }
        self._bad: dict[tuple[str, int], dict[str, Any]] = {}
        self._step = 0
        self._states = {
            lane: stream.first_state(self._plan, lane) for lane in self._lanes
        }
        self._rows: stream.RowIterator | None = None

    def start(self) -> None:
        """Begin to read ahead (after restore, while the program compiles)."""
        if self._rows is not None:
            return
        states = [self._states[lane] for lane in self._lanes]
        data = self._data
        dataset = stream.RowDataset(self._plan, states, data.read_threads)
        # Lanes must not wander between workers: as many workers as divide the lanes.
        workers = max(
            (n for n in range(1, data.num_workers + 1) if len(states) % n == 0),
            default=0,
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its debug flags
                flags.FLAGS.mark_as_parsed()
            options = grain_multiprocessing.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=2 * len(states) // workers
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
        self._rows = iter(dataset)
        self._rows.start_prefetch()

    def __iter__(self) -> Iterator[packing.Rows]:
        return self

    def __next__(self) -> packing.Rows:
        self.start()
        parts, per_lane = [], self._plan.rows_per_lane
        for lane in self._lanes:
            rows, chunk = next(self._rows)
            first = max(self._first - lane * per_lane, 0)
            stop = min(self._stop - lane * per_lane, per_lane)
            parts.append(packing.take(rows, slice(first, stop)))
            self._states[lane] = chunk.state
            if chunk.bad:
                self._list_bad(chunk.bad)
        self._step += 1
        self._check_bad()
        return packing.join(parts)

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batch returned last; JSON-able."""
        lanes = {str(lane): state for lane, state in self._states.items()}
        return {
            "version": _VERSION,
            "step": self._step,
            "order": self.order,
            "lanes": lanes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which `state` was taken, by any process count."""
        if state.get("version") != _VERSION:
            raise config.InputError(
                f"the data state has the version {state.get('version')!r}; this "
                f"program reads {_VERSION}"
            )
        self._check_order(state["order"])
        missing = [lane for lane in self._lanes if str(lane) not in state["lanes"]]
        if missing:
            raise config.InputError(
                f"the data state lacks the lanes {missing}: it is of other processes; "
                "join the states of all processes with merge_states first"
            )
        self._stop_reading()
        self._step = state["step"]
        self._states = {lane: state["lanes"][str(lane)] for lane in self._lanes}

    def _check_order(self, old: Mapping[str, Any]) -> None:
        """InputError naming what differs from the run that took a state."""
        if old["manifest"] != self.order["manifest"]:
            cache = files.Cache(self._data.cache_dir)
            kept = cache.kept(_manifest_key(old["manifest"]))
            lines = source.changes(json.loads(kept), self._manifest) if kept else []
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            what = "; ".join(lines[:5]) + more or (
                "which file is not known, as the list of that run's files is not in "
                f"{str(cache.root)!r}"
            )
            raise config.InputError(
                f"the corpus is not the one this run began with: {what}. Put the old "
                "files back and resume, or start a new run"
            )
        differing = [
            f"{key} was {old.get(key)!r}, is {value!r}"
            for key, value in self.order.items()
            if old.get(key) != value
        ]
        if differing:
            raise config.InputError(
                "the data state is of another run: " + "; ".join(differing) + ". Set "
                "them as they were and resume, or start a new run"
            )

    def counters(self) -> dict[str, int]:
        """Sums over this process's lanes: records, documents, tokens, padding, ..."""
        total: Counter = Counter()
        for state in self._states.values():
            total.update(state["counts"])
        names = ("records", "documents", "tokens", "padding_tokens", "bad_records")
        zeros = dict.fromkeys((*names, "split_documents", "held_out"), 0)
        excluded = sum(one.num_excluded for one in self.sources)
        counted = {**zeros, **total, "excluded_files": excluded}
        return counted | {"epochs": math.floor(self.epoch)}

    @property
    def epoch(self) -> float:
        """Passes over the source that was passed over most."""
        share = len(self._lanes) / self._plan.lanes
        passes = []
        for number, one in enumerate(self.sources):
            drawn = sum(state["drawn"][number] for state in self._states.values())
            passes.append(drawn / (len(one) * share))
        return max(passes)

    def bad_records(self) -> list[dict[str, Any]]:
        """The broken records met since this loader was made."""
        return list(self._bad.values())

    def _list_bad(self, found: Sequence[tuple[str, source.Bad]]) -> None:
        path = pathlib.Path(self._bad_path) if self._bad_path else None
        if path and not self._bad and path.exists():
            self._bad = _read_list(path)
        lines = []
        for name, bad in found:
            if (bad.file, bad.offset) not in self._bad:
                entry = {"source": name, **bad._asdict()}
                self._bad[bad.file, bad.offset] = entry
                lines.append(json.dumps(entry) + "\n")
        if path and lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(lines)

    def _check_bad(self) -> None:
        """Stop when the corpus has more broken records than max_bad_share.

        Only first epochs count, where no record comes twice. A process that reads part
        of the lanes sees a sample, so it allows three standard deviations.
        """
        counts = [state["counts"] for state in self._states.values()]
        bad = sum(count.get("bad_first_epoch", 0) for count in counts)
        if not bad:
            return
        seen = sum(count.get("records_first_epoch", 0) for count in counts)
        part = len(self._lanes) / self._plan.lanes
        corpus = math.ceil(sum(len(one) for one in self.sources) * part)
        records = min(corpus, max(seen, _ENOUGH_RECORDS))
        allowed = self._data.max_bad_share * records
        if part < 1:
            allowed += 3 * math.sqrt(allowed)
        if bad <= allowed:
            return
        reasons = ", ".join(
            f"{key.partition('/')[2]} {value}"
            for key, value in sorted(self.counters().items())
            if key.startswith("bad_records/")
        )
        first = next(iter(self._bad.values()), {})
        listed = f"; all are in {str(self._bad_path)!r}" if self._bad_path else ""
        raise config.InputError(
            f"{bad} of {seen} records read ({corpus} in all) are broken ({reasons}): "
            f"more than data.max_bad_share={self._data.max_bad_share}. The first is in "
            f"{first.get('file')!r} at {first.get('offset')}{listed}. Mend or exclude "
            "them, or raise data.max_bad_share"
        )

    def _stop_reading(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def close(self) -> None:
        """Stop threads and workers; state() and counters() stay."""
        self._stop_reading()


def make_plan(
    data: DataConfig,
    vocabulary: tokenizer.Tokenizer,
    sources: Sequence[source.Source],
    lanes: int,
    rows_per_lane: int,
    seed: int,
) -> stream.Plan:
    """The plan of a config's lanes."""
    mixed = mixture.make(
        [one.name for one in sources],
        [one.config.weight for one in sources],
        [len(one) for one in sources],
        [one.num_bytes for one in sources],
        stages=data.stages,
        weight_by=data.weight_by,
        seed=seed,
    )
    return stream.Plan(
        sources=tuple(sources),
        mixture=mixed,
        tokenizer=vocabulary,
        seq_tokens=data.seq_tokens,
        lanes=lanes,
        rows_per_lane=rows_per_lane,
        holdout_share=data.holdout_share,
        window_docs=data.window_docs,
        window_bytes=data.window_bytes or max(262_144, 256 * data.seq_tokens),
        seed=seed,
    )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all processes at one step as one, for any number of processes."""
    first = states[0]
    lanes: dict[str, Any] = {}
    for number, state in enumerate(states):
        for key in ("version", "step", "order"):
            if state[key] != first[key]:
                raise config.InputError(
                    f"the data states of process 0 and {number} differ in {key}: "
                    f"{first[key]!r} and {state[key]!r}; all processes must read the "
                    "same corpus with the same config and save at the same step"
                )
        lanes |= state["lanes"]
    return {**first, "lanes": dict(sorted(lanes.items(), key=lambda x: int(x[0])))}


def _manifest_key(digest: str) -> str:
    return f"manifest-{digest[:40]}.json"


def _read_list(path: pathlib.Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The broken records that an earlier run listed; half a last line is cut off."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    entries = map(json.loads, whole.splitlines())
    return {(entry["file"], entry["offset"]): entry for entry in entries}


def _begin_worker(worker: int, workers: int) -> None:
    """What a reading process does first: Ctrl-C is for the main process to answer, and
    when that one is killed nobody else would stop its workers."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sentinel = multiprocessing.parent_process().sentinel

    def follow() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
