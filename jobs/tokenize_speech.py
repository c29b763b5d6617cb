"""Job `tokenize`: speech becomes units, in shards that a Ray Data actor pool works through.

Reads `speech/`, the recordings of `manifest/utterances.parquet`, and `encoder/`. Writes one `units/part-NAME.parquet` a
shard and, for audio that cannot become units, `quarantine/tokenize-NAME.parquet`; other clips go on.

What travels through Ray are names of shards and counts. An actor reads a shard's sound files, decodes them on threads,
and writes the units itself, so that no waveform enters the object store. Shards and the batches inside them are formed
from what they hold, never from arrival, and a shard's file appears whole under a name that says what it holds and what
it was made by: a job that was killed skips what is there and ends in the same bytes as one that was not, and of a
corpus that has grown or changed the shards of those clips alone are made. (Ray Data's CheckpointConfig resumes by row
but names files by run; it could not promise that.) A store that does not answer stops the job, and sets no clip aside.
"""

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from jobs.shards import RECORDINGS, Shard, plan
from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

UNITS_SCHEMA = pa.schema(
    {
        "utterance_id": pa.string(),
        "units": pa.list_(pa.int16()),
        "durations": pa.list_(pa.int16()),
        "text": pa.string(),
        "speaker": pa.string(),
        "language": pa.string(),
        "seconds": pa.float64(),
        "source": pa.string(),
        "sha256": pa.string(),
        "role": pa.string(),
        "category": pa.string(),
        "question_id": pa.string(),
        "answer": pa.string(),
        "split": pa.string(),
        "voice": pa.string(),
        "stranger": pa.bool_(),
    }
)
PHASES = ("read", "decode", "encode", "write")
_DECODERS = 4
"""Threads of an actor that decode, at least: on a GPU as many as it has processors, or it would wait for sound."""
_READERS = 16
_SHOWN_PROBLEMS = 5
_DIGITS = 8
"""Of the hash of what made the units, in names."""


def run(context: Context) -> dict[str, Any]:
    import ray.data

    from jobs import ray_data

    recipe, workspace = context.recipe, context.workspace
    shards = named(plan(workspace, recipe), context)
    if not shards:
        raise JobError(
            f"{workspace.uri}: no clip in speech/ or manifest/utterances.parquet; run manifest and synthesize"
        )
    there = set(workspace.list("units"))
    for stale in there - {shard.units for shard in shards}:
        if stale.startswith("units/part-"):
            workspace.delete(stale)
    done = _finished(workspace, [shard for shard in shards if shard.units in there])
    missing = [shard for shard in shards if shard not in done]
    for stale in set(workspace.list("quarantine")) - {shard.quarantine for shard in done}:
        if stale.startswith("quarantine/tokenize-"):
            workspace.delete(stale)
    clips = sum(shard.count for shard in shards)
    tallied = [*done.values()]
    bad = sum(t["quarantined"] for t in tallied)
    with context.progress.count("tokenizing", clips, "clips", done=sum(t["clips"] for t in tallied)) as counter:
        if missing:
            ray_data.connect(recipe.resources)
            pool = recipe.resources.tokenisation
            rows = [{"name": s.name, "file": s.file, "first": s.first, "count": s.count} for s in missing]
            tallies = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                cast("Any", Tokenizer),
                fn_constructor_args=(workspace, recipe),
                compute=ray.data.ActorPoolStrategy(
                    min_size=pool.min_actors,
                    max_size=pool.max_actors,
                    # While the GPU has one shard, the processors decode the next.
                    max_concurrent_calls_per_actor=2 if pool.gpus else 1,
                    enable_true_multi_threading=True,
                ),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
            )
            for row in tallies.iter_rows():
                tallied.append(row)
                bad += row["quarantined"]
                counter.advance(row["clips"])
                _refuse_too_many(workspace, shards, bad, clips, recipe.data.max_bad_fraction)
    _refuse_too_many(workspace, shards, bad, clips, recipe.data.max_bad_fraction)
    set_aside = set(workspace.list("quarantine"))
    quarantine = [shard.quarantine for shard in shards if shard.quarantine in set_aside]
    return {"figures": _figures(tallied), "outputs": ["units", *quarantine]}


def named(shards: list[Shard], context: Context) -> list[Shard]:
    """With a hash, in their names, of what else than their clips their units depend on."""
    if not shards:
        return []
    recipe = context.recipe
    encoder = context.workspace.digest("encoder")
    settings = [recipe.data.max_seconds, recipe.encoder.precision, recipe.encoder.model_dump(mode="json")["long"]]

    @cache
    def maker(speech: str) -> str:
        return hashlib.sha256(json.dumps([encoder, settings, speech]).encode()).hexdigest()[:_DIGITS]

    # A file of `speech/` is named by what it says; a service (`engine: http`) may say it another way another time.
    spoken = context.inputs.get("synthesize", "")
    return [replace(s, name=f"{s.name}-{maker('' if s.file == RECORDINGS else spoken)}") for s in shards]


def _finished(workspace: "Workspace", there: list[Shard]) -> dict[Shard, dict[str, Any]]:
    """What the shards that are there came to. One with a sound that was missing is deleted: it may be there now."""
    with ThreadPoolExecutor(_READERS) as readers:
        tallies = dict(zip(there, readers.map(lambda shard: tally(workspace, shard), there), strict=True))
    for shard in [shard for shard, told in tallies.items() if "missing_file" in json.loads(told["reasons"])]:
        workspace.delete(shard.units)
        del tallies[shard]
    return tallies


class Tokenizer:
    """One actor: holds the encoder, turns a shard's clips into units and writes them."""

    def __init__(self, workspace: "Workspace", recipe: "Recipe") -> None:
        import torch

        from speechgpt.speech.encoder import SpeechEncoder

        cpus = int(recipe.resources.tokenisation.cpus)
        torch.set_num_threads(max(1, cpus))
        self._decoders = max(_DECODERS, cpus)
        began = time.perf_counter()
        self._workspace = workspace
        self._encoding = threading.Lock()
        self._longest = None if recipe.encoder.long else recipe.data.max_seconds
        with workspace.fetch("encoder") as directory:
            self._encoder = SpeechEncoder.load(
                directory,
                recipe.encoder.batch_seconds,
                recipe.encoder.long,
                recipe.encoder.precision,
                recipe.resources.tokenisation.device,
            )
        self._start = time.perf_counter() - began

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from speechgpt.runtime.recordings import QUARANTINE_SCHEMA

        shard, clock = Shard(row["name"], row["file"], row["first"], row["count"]), _Clock()
        began = time.perf_counter()
        with clock.counts("read"):
            rows = self._workspace.read_rows(shard.file, shard.first, shard.count).to_pylist()
        with tempfile.TemporaryDirectory(prefix="speechgpt-tokenize-") as folder:
            with ThreadPoolExecutor(self._decoders) as pool:
                heard = list(pool.map(lambda clip: _listen(clip, shard.file, self._longest, Path(folder), clock), rows))
            good = [clip for clip in heard if isinstance(clip, _Heard)]
            bad = [clip for clip in heard if not isinstance(clip, _Heard)]
            with self._encoding, clock.counts("encode", time.process_time):
                encoded = self._encode(good)
        bad += [made for made in encoded if "reason" in made]
        units = pa.Table.from_pylist([made for made in encoded if "units" in made], UNITS_SCHEMA)
        quarantine = pa.Table.from_pylist(bad, QUARANTINE_SCHEMA)
        with clock.counts("write"):
            if bad:
                self._workspace.write_table(shard.quarantine, quarantine)
            # Last, since its presence says that the shard is finished.
            self._workspace.write_table(shard.units, units)
        start, self._start = self._start, 0.0
        took = clock.seconds | {"wall": time.perf_counter() - began, "start": start}
        return _tally(shard, units, quarantine) | took

    def _encode(self, clips: "list[_Heard]") -> list[dict[str, Any]]:
        """Of each clip its row of the units table, or of the quarantine table."""
        if self._longest is not None:
            units = self._encoder.encode([clip.wave for clip in clips])
            return [clip.row(*found) for clip, found in zip(clips, units, strict=True)]
        rows = []
        for clip in clips:
            try:
                rows.append(clip.row(*self._encoder.encode([clip.wave])[0]))
            except ValueError as error:
                detail = f"{clip.columns['utterance_id']}: {error}"
                rows.append({"source": clip.columns["source"], "reason": "monotonous", "detail": detail})
        return rows


def tally(workspace: "Workspace", shard: Shard) -> dict[str, Any]:
    """What a finished shard came to, read from its files."""
    from speechgpt.runtime.recordings import QUARANTINE_SCHEMA

    units = workspace.read_table(shard.units)
    complete = units.num_rows == shard.count
    return _tally(shard, units, QUARANTINE_SCHEMA.empty_table() if complete else workspace.read_table(shard.quarantine))


def _tally(shard: Shard, units: pa.Table, quarantine: pa.Table) -> dict[str, Any]:
    return {
        "clips": shard.count,
        "quarantined": quarantine.num_rows,
        # As text, since a row's fields are the same in all rows of a dataset.
        "reasons": json.dumps(Counter(quarantine["reason"].to_pylist())),
        "units": len(pc.list_flatten(units["units"])),
        "seconds": pc.sum(units["seconds"]).as_py() or 0.0,
        "without_text": units["text"].null_count,
    }


class _Clock:
    """Processor-seconds by what they were for; threads may count at the same time."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def counts(self, phase: str, clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
        began = clock()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[phase] += clock() - began


@dataclass(frozen=True)
class _Heard:
    wave: Any
    columns: dict[str, Any]

    def row(self, units: Any, durations: Any) -> dict[str, Any]:
        return {**self.columns, "units": units, "durations": durations}


def _listen(
    row: dict[str, Any], file: str, longest: float | None, folder: Path, clock: _Clock
) -> "_Heard | dict[str, str]":
    """Decode one clip: its wave and the columns that go with its units, or its row of the quarantine table.

    longest: seconds; None takes any length, by way of files in `folder`. Raises StoreError, which is no fault of the
    clip's.
    """
    from speechgpt.runtime.files import StoreError
    from speechgpt.runtime.recordings import sound_of
    from speechgpt.speech import audio

    source = row["path"] if "path" in row else f"{file}#{row['id']}"
    try:
        if longest is None and "path" in row:
            with clock.counts("decode"):
                wave, sha256 = _from_disk(row["path"], folder / hashlib.sha256(row["id"].encode()).hexdigest())
        else:
            with clock.counts("read"):
                data = sound_of(row)
            with clock.counts("decode"):
                wave, sha256 = audio.decode(data, max_seconds=longest), hashlib.sha256(data).hexdigest()
    except audio.AudioError as error:
        return {"source": source, "reason": error.reason, "detail": f"{row['id']}: {error.detail}"}
    except FileNotFoundError as error:
        return {"source": source, "reason": "missing_file", "detail": f"{row['id']}: {error}"}
    except StoreError:
        raise
    except OSError as error:
        return {"source": source, "reason": "unreadable", "detail": f"{row['id']}: {error}"}
    kept = {name: row.get(name) for name in UNITS_SCHEMA.names}
    own = {
        "utterance_id": row["id"],
        "seconds": len(wave) / audio.SAMPLE_RATE,
        "source": source,
        "sha256": sha256,
        "role": row.get("role") or "recording",
        "stranger": bool(row.get("stranger")),
    }
    return _Heard(wave, kept | own)


def _from_disk(path: str, draft: Path) -> tuple[Any, str]:
    """A recording of any length as a memory-mapped wave, and its sha256. draft: a free name for files on the way."""
    from speechgpt.runtime import inside_files
    from speechgpt.runtime.files import PACKAGE, open_local
    from speechgpt.speech import audio

    local = Path(path)
    if path.startswith(("s3://", PACKAGE)) or inside_files.split(path)[1] is not None:
        local = draft.with_suffix(".sound")
        with open_local(path) as source, local.open("wb") as target:
            shutil.copyfileobj(source, target)
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return audio.decode_onto_disk(local, draft.with_suffix(".f32")), digest


def _refuse_too_many(workspace: "Workspace", shards: list[Shard], bad: int, clips: int, limit: float) -> None:
    """Raise JobError once more than `limit` of all clips, `bad`, are in quarantine: the rest cannot mend that."""
    if bad <= limit * clips:
        return
    set_aside = set(workspace.list("quarantine"))
    names = [shard.quarantine for shard in shards if shard.quarantine in set_aside]
    first = [row for name in names[:_SHOWN_PROBLEMS] for row in workspace.read_table(name).to_pylist()][
        :_SHOWN_PROBLEMS
    ]
    shown = "\n".join(f"  {row['source']}: {row['reason']}: {row['detail']}" for row in first)
    raise JobError(
        f"{bad} of {clips} clips cannot become units, more than data.max_bad_fraction = {limit:g} allows; "
        f"all are in {workspace.path('quarantine')}. The first:\n{shown}"
    )


def _figures(done: list[dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(t[key] for t in done) for key in ("clips", "quarantined", "units", "seconds", "without_text")}
    reasons = sum((Counter(json.loads(t["reasons"])) for t in done), Counter[str]())
    # Of this attempt; shards that an earlier one finished took their time then.
    took = {phase: round(sum(t.get(phase, 0.0) for t in done), 3) for phase in (*PHASES, "wall", "start")}
    return {
        "utterances": total["clips"] - total["quarantined"],
        "quarantined": total["quarantined"],
        "reasons": dict(sorted(reasons.items())),
        "without_text": total["without_text"],
        "hours": round(total["seconds"] / 3600, 4),
        "units_per_second": round(total["units"] / max(total["seconds"], 1e-9), 3),
        "shards": len(done),
        "worker_seconds": took,
    }


def _sections(recipe: "Recipe") -> tuple[str, ...]:
    """What units depend on. Keys that came later count only where they are set: a run without them is the run that it
    was before."""
    later = {
        "encoder.long": recipe.encoder.long is not None,
        "encoder.precision": recipe.encoder.precision != "float32",
        "corpora.shard_seconds": "shard_seconds" in recipe.corpora.model_fields_set,
    }
    return ("data", *(name for name, is_set in later.items() if is_set))


JOB = Job(
    name="tokenize",
    part="units",
    run=run,
    reads=("manifest", "synthesize", "train-encoder", "fit-units"),
    sections=_sections,
    renews=("units", "quarantine/tokenize-"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
