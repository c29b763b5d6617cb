"""Speak the prompts of the manifest with the recipe's voices, in shards that a Ray Data actor pool works through.

A shard's file is named by what it says and how: what an attempt that was killed has spoken, or one with other prompts
besides, is not spoken again.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from jobs.shell import Context, Job, JobError, command

if TYPE_CHECKING:
    import pyarrow as pa

    from speechgpt.recipe import Recipe
    from speechgpt.runtime.progress import Progress
    from speechgpt.runtime.workspace import Workspace

_SHARD = 250
"""Prompts in one file of speech."""
_QUARANTINE = "quarantine/synthesize"


def run(context: Context) -> dict[str, Any]:
    prompts = context.workspace.read_table("manifest/prompts.parquet")
    _make_way(context.workspace, {shard["file"] for shard in _plan(prompts, context.recipe)})
    unspoken = speak(prompts, context.recipe, context.workspace, context.progress)
    outputs = (["speech"] if len(prompts) else []) + ([_QUARANTINE] if unspoken else [])
    seconds = sum(context.workspace.read_table("speech")["seconds"].to_pylist()) if len(prompts) else 0
    figures = {"utterances": len(prompts) - unspoken, "hours": seconds / 3600, "failed": unspoken}
    return {"figures": figures, "outputs": outputs}


def _make_way(workspace: "Workspace", wanted: set[str]) -> None:
    """Delete the files that are none of `wanted`, and those with prompts that could not be spoken: they may be now."""
    refused = {name.replace(_QUARANTINE, "speech", 1) for name in workspace.list(_QUARANTINE)}
    for file in workspace.list("speech"):
        if file.startswith("speech/part-") and (file not in wanted or file in refused):
            workspace.delete(file)
    workspace.delete(_QUARANTINE)


def speak(prompts: "pa.Table", recipe: "Recipe", workspace: "Workspace", progress: "Progress") -> int:
    """Write `speech/` of the workspace, shards that are there excepted; returns how many prompts could not be spoken.

    Raises JobError if those are more than the recipe allows.
    """
    import ray.data

    from jobs import ray_data

    ray_data.connect(recipe.resources)
    shards = _plan(prompts, recipe)
    written = set(workspace.list("speech"))
    missing = [s for s in shards if s["file"] not in written]
    pool = recipe.resources.synthesis
    table = ray.put(_in_order(prompts))
    with progress.count("speaking", len(shards), "shards", done=len(shards) - len(missing)) as counter:
        if missing:
            spoken = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
                Speaker,  # type: ignore[arg-type]  # Ray takes classes, its types do not say so
                fn_constructor_args=(workspace, table, recipe),
                compute=ray.data.ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
                num_cpus=pool.cpus,
            )
            for _ in spoken.iter_rows():
                counter.advance()
    unspoken = workspace.read_table(_QUARANTINE) if workspace.exists(_QUARANTINE) else prompts.slice(0, 0)
    limit = recipe.data.max_bad_fraction * len(prompts)
    if len(unspoken) > limit:
        first = unspoken.to_pylist()[0]
        raise JobError(
            f"{len(unspoken)} of {len(prompts)} prompts could not be spoken, more than data.max_bad_fraction allows; "
            f"all are in {workspace.path(_QUARANTINE)}. The first: {first['source']}: {first['detail']}"
        )
    return len(unspoken)


class Speaker:
    """One actor: speaks the prompts of a shard and writes them as one Parquet file with FLAC bytes."""

    def __init__(self, workspace: Any, prompts: Any, recipe: Any) -> None:
        import ray

        from speechgpt.speech.voices import Voice

        self._workspace = workspace
        self._prompts = ray.get(prompts)
        sections = {**recipe.voices.questions, **recipe.voices.held_out}
        # Whoever evaluates a bundle need not have the voices that spoke in its training alone.
        self._voices = {name: Voice(sections[name]) for name in set(self._prompts["voice"].to_pylist())}
        self._seed, self._answer, self._recorded = recipe.seed, recipe.voices.answer, recipe.voices.recorded

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        import numpy as np
        import pyarrow as pa

        from speechgpt.speech import audio, augment
        from speechgpt.speech.voices import VoiceError

        spoken, silent = [], []
        for row in self._prompts.slice(shard["first"], _SHARD).to_pylist():
            try:
                seed = _seed(self._seed, row["id"])
                wave = self._voices[row["voice"]].say(row["text"], seed)
                draw = np.random.default_rng((seed, 1))
                if row["split"] == "train" and row["voice"] != self._answer and draw.random() < self._recorded:
                    wave = augment.recorded(wave, draw)
            except VoiceError as error:
                silent.append({"source": row["id"], "reason": "unspoken", "detail": str(error)})
                continue
            flac = audio.encode(wave, "flac")
            sound = {
                "speaker": row["voice"],
                "seconds": len(wave) / audio.SAMPLE_RATE,
                "sha256": hashlib.sha256(flac).hexdigest(),
                "audio": flac,
            }
            spoken.append({**row, **sound})
        if silent:
            self._workspace.write_table(shard["file"].replace("speech", _QUARANTINE, 1), pa.Table.from_pylist(silent))
        self._workspace.write_table(shard["file"], pa.Table.from_pylist(spoken))
        return {"file": shard["file"]}


def _in_order(prompts: "pa.Table") -> "pa.Table":
    return prompts.sort_by("id")


def _plan(prompts: "pa.Table", recipe: "Recipe") -> list[dict[str, Any]]:
    """{first, file} of each shard: its first prompt in the order of their ids, and where they go once spoken."""
    ordered = _in_order(prompts)
    parts = ((first, ordered.slice(first, _SHARD).to_pylist()) for first in range(0, len(ordered), _SHARD))
    return [{"first": first, "file": _file(rows, recipe)} for first, rows in parts]


def _file(rows: list[dict[str, Any]], recipe: "Recipe") -> str:
    """Named by the prompts' ids, and by all else that their sound depends on."""
    voices = recipe.voices
    sections = {**voices.questions, **voices.held_out}
    speakers = {row["voice"] for row in rows}
    # How often a voice is drawn, the prompts say.
    by = {name: sections[name].model_dump(mode="json", exclude={"share", "examined"}) for name in speakers}
    how = [rows, by, recipe.seed, voices.answer, voices.recorded]
    ids, rest = "\n".join(row["id"] for row in rows), json.dumps(how, sort_keys=True)
    return f"speech/part-{_digest(ids)[:16]}-{_digest(rest)[:8]}.parquet"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _seed(seed: int, prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:8], "big")


JOB = Job(
    name="synthesize",
    part="speech",
    run=run,
    reads=("manifest",),
    sections=("voices", "data.max_bad_fraction"),
    renews=("speech", _QUARANTINE),
)
main = command(JOB)

if __name__ == "__main__":
    main()
