"""Job `dataset-page`: the instruction rows as one page to read and listen to, `reports/dataset.html`.

Reads `instructions/`, `units/` and the sound in `speech/` and the manifest. A stretch of units is heard as the clip
that it came from or, where there is none, from the workspace's vocoder if that is trained.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.shell import Context, Job, command

if TYPE_CHECKING:
    import pyarrow as pa

    from speechgpt.evaluation.dataset_page import Example, Sound
    from speechgpt.language.prompts import Exchange
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.workspace import Workspace

PAGE = "reports/dataset.html"
_ROWS = "instructions/rows.parquet"
_EXAMPLES = 4
"""Of each kind."""
_SPARE = 4
"""Drawn for each example, in case some must not be shown."""
_CATEGORIES = 30
_WORDING_ROWS = 5000
_CROSS_MODAL = ("transcribe", "speak")


def run(context: Context) -> dict[str, Any]:
    from speechgpt.evaluation import dataset_page

    recipe, workspace = context.recipe, context.workspace
    with context.progress.count("reading rows", None, "parts") as counter:
        rows = _Rows()
        for name in _parts(workspace, _ROWS):
            rows.add(workspace.read_table(name))
            counter.advance()
    drawn = {kind: [_read(row, recipe) for row in rows.drawn(kind)] for kind in sorted(rows.kinds)}
    fit = {kind: [each for each in all if dataset_page.may_be_shown(each.exchanges)] for kind, all in drawn.items()}
    hidden = sum(len(all) for all in drawn.values()) - sum(len(kept) for kept in fit.values())
    chosen = [each for kept in fit.values() for each in kept[:_EXAMPLES]]
    clips = _Clips(recipe.codebook.clusters, {units for each in chosen for units in _stretches(each)})
    with context.progress.count("reading units", None, "parts") as counter:
        for name in _parts(workspace, "units"):
            clips.add(workspace.read_table(name))
            counter.advance()
    sounds = _recordings(workspace, clips.of_units)
    sounds |= _spoken(workspace, sorted(clips.wanted - set(sounds)))
    facts = dataset_page.DatasetFacts(
        title=recipe.name,
        report=workspace.read_json("instructions/report.json"),
        row_units=rows.joined("units"),
        row_words=rows.joined("words"),
        categories=dict(rows.categories.most_common(_CATEGORIES)),
        seconds=clips.all_seconds(),
        speakers=clips.speakers,
        unit_counts=clips.unit_counts,
        wordings=rows.wordings(recipe),
        hidden=hidden,
    )
    page = dataset_page.render(facts, [_with_sounds(each, sounds) for each in chosen])
    workspace.write_bytes(PAGE, page.encode())
    heard = Counter(sound.source for sound in sounds.values())
    figures = {"rows": sum(facts.report["rows"].values()), "examples": len(chosen), "hidden": hidden}
    figures |= {"recordings": heard["recording"], "by_vocoder": heard["vocoder"], "bytes": len(page)}
    return {"figures": figures, "outputs": [PAGE]}


class _Rows:
    """Counts over the parts of the rows, and the rows whose ids have the smallest hashes."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.categories: Counter[str] = Counter()
        self._lengths: dict[str, dict[str, list[Any]]] = {"units": {}, "words": {}}
        self._smallest: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}

    def add(self, part: "pa.Table") -> None:
        import pyarrow.compute as pc

        for kind in pc.unique(part["kind"]).to_pylist():
            rows = part.filter(pc.equal(part["kind"], kind))
            self.kinds.add(kind)
            units = pc.count_substring_regex(rows["plain_text"], r"<\d+>")
            words = pc.count_substring_regex(pc.replace_substring_regex(rows["plain_text"], r"<[^ ]*>", ""), r"\S+")
            for name, values in (("units", units), ("words", words)):
                self._lengths[name].setdefault(kind, []).append(values.to_numpy())
            self._draw(kind, rows)
        for entry in part["category"].value_counts().to_pylist():
            self.categories[entry["values"]] += entry["counts"]

    def _draw(self, kind: str, rows: "pa.Table") -> None:
        most = _WORDING_ROWS if kind in _CROSS_MODAL else _EXAMPLES * _SPARE
        hashes = [(-_hash(name), name, number) for number, name in enumerate(rows["id"].to_pylist())]
        best = heapq.nlargest(most, hashes)
        found = [(key, name, rows.slice(number, 1).to_pylist()[0]) for key, name, number in best]
        kept = self._smallest.get(kind, []) + found
        self._smallest[kind] = heapq.nlargest(most, kept, key=lambda entry: entry[:2])

    def drawn(self, kind: str) -> list[dict[str, Any]]:
        return [row for _, _, row in self._smallest[kind][: _EXAMPLES * _SPARE]]

    def joined(self, name: str) -> dict[str, Any]:
        import numpy as np

        return {kind: np.concatenate(parts) for kind, parts in self._lengths[name].items()}

    def wordings(self, recipe: "Recipe") -> dict[str, int]:
        """Different wordings among the cross-modal rows that were drawn."""
        found: dict[str, set[str]] = {kind: set() for kind in _CROSS_MODAL}
        for kind in _CROSS_MODAL:
            for _, _, row in self._smallest.get(kind, []):
                found[kind] |= {each.description for each in _exchanges(row, recipe)}
        return {kind: len(wordings) for kind, wordings in found.items()}


class _Clips:
    """Counts over the clips, and where the wanted stretches of units come from."""

    def __init__(self, clusters: int, wanted: "set[tuple[int, ...]]") -> None:
        import numpy as np

        self.wanted = wanted
        self.of_units: dict[tuple[int, ...], str] = {}
        self.speakers: Counter[str] = Counter()
        self.unit_counts = np.zeros(clusters, np.int64)
        self._seconds: list[Any] = []
        self._lengths = {len(units) for units in wanted}

    def add(self, part: "pa.Table") -> None:
        import numpy as np
        import pyarrow.compute as pc

        flat = pc.list_flatten(part["units"]).to_numpy()
        counts = np.bincount(flat, minlength=len(self.unit_counts))
        self.unit_counts = counts + np.pad(self.unit_counts, (0, len(counts) - len(self.unit_counts)))
        self._seconds.append(pc.fill_null(part["seconds"], 0.0).to_numpy())
        for entry in part["speaker"].value_counts().to_pylist():
            self.speakers[entry["values"] or "unnamed"] += entry["counts"]
        lengths = pc.list_value_length(part["units"]).to_numpy(zero_copy_only=False)
        for number in np.flatnonzero(np.isin(lengths, list(self._lengths))).tolist():
            units = tuple(part["units"][number].as_py())
            if units in self.wanted:
                self.of_units.setdefault(units, part["utterance_id"][number].as_py())

    def all_seconds(self) -> Any:
        import numpy as np

        return np.concatenate(self._seconds) if self._seconds else np.zeros(0)


def _parts(workspace: "Workspace", folder: str) -> list[str]:
    return [name for name in workspace.list(folder) if name.endswith(".parquet") and "/_" not in name]


def _read(row: dict[str, Any], recipe: "Recipe") -> "Example":
    from speechgpt.evaluation.dataset_page import Example
    from speechgpt.speech.units import parse_units

    if row["kind"] == "units":
        return Example(row["id"], "units", row["category"], (), tuple(parse_units(row["plain_text"])))
    return Example(row["id"], row["kind"], row["category"], _exchanges(row, recipe))


def _exchanges(row: dict[str, Any], recipe: "Recipe") -> "Sequence[Exchange]":
    """A row of ours by its template; a published one, which may keep another dialect, by its markers."""
    from speechgpt.interop.speech_instruct import PublishedText, read
    from speechgpt.language.prompts import read_row

    try:
        return read_row(recipe.language.dialect, row["plain_text"])
    except ValueError:
        return read(PublishedText(row["prefix"], row["plain_text"])).exchanges


def _stretches(example: "Example") -> "Iterator[tuple[int, ...]]":
    yield from filter(None, [example.bare_units])
    for turn in example.exchanges:
        yield from filter(None, [turn.question_units, turn.answer_units])


def _with_sounds(example: "Example", sounds: "dict[tuple[int, ...], Sound]") -> "Example":
    from dataclasses import replace

    return replace(example, sounds={units: sounds[units] for units in _stretches(example) if units in sounds})


def _recordings(workspace: "Workspace", of_units: dict[tuple[int, ...], str]) -> "dict[tuple[int, ...], Sound]":
    """The sound files of clips, by their units; what is no longer there is left to the vocoder."""
    import pyarrow.compute as pc
    import pyarrow.dataset

    from speechgpt.evaluation.dataset_page import Sound
    from speechgpt.runtime.recordings import read_bytes

    wanted = sorted(of_units.values())
    found: dict[str, bytes] = {}
    if workspace.exists("speech"):
        speech = pyarrow.dataset.dataset(workspace.root("speech"), filesystem=workspace.fs)
        table = speech.to_table(["id", "audio"], filter=pc.field("id").isin(wanted))
        found |= {row["id"]: row["audio"] for row in table.to_pylist()}
    if workspace.exists("manifest/utterances.parquet"):
        recordings = workspace.read_table("manifest/utterances.parquet").select(["id", "path"]).to_pylist()
        paths = {row["id"]: row["path"] for row in recordings}
        for name in set(wanted) & set(paths) - set(found):
            try:
                found[name] = read_bytes(paths[name])
            except OSError:
                continue
    return {units: Sound(found[name], "recording") for units, name in of_units.items() if name in found}


def _spoken(workspace: "Workspace", stretches: "Sequence[tuple[int, ...]]") -> "dict[tuple[int, ...], Sound]":
    """What the workspace's vocoder says, if there is one and it knows the units."""
    from speechgpt.evaluation.dataset_page import Sound
    from speechgpt.speech import audio
    from speechgpt.speech.vocoder import Vocoder

    if not stretches or not workspace.exists("vocoder/model.safetensors"):
        return {}
    with workspace.fetch("vocoder") as directory:
        vocoder = Vocoder.load(directory)
    known = [units for units in stretches if max(units) < vocoder.units]
    return {units: Sound(audio.encode(vocoder.synthesize([units])[0], "flac"), "vocoder") for units in known}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


JOB = Job(
    name="dataset-page",
    part="reports",
    run=run,
    reads=("instructions",),
    reads_if_there=("train-vocoder",),
    sections=("language.dialect", "codebook.clusters"),
)
main = command(JOB)

if __name__ == "__main__":
    main()
