"""The job `dataset-page` on a workspace made by hand: what it counts, where its sound comes from, what it hides."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import dataset_page
from jobs.build_instructions import REPORT, ROWS, write_part
from jobs.dataset_page import PAGE
from jobs.shell import execute
from jobs.tokenize_speech import UNITS_SCHEMA
from speechgpt.language.config import InstructionsSection
from speechgpt.language.instructions import Row, RowBuilder, Utterance, WrittenQuestion, tally
from speechgpt.language.prompts import PromptFormat
from speechgpt.recipe import Recipe, load
from speechgpt.runtime.workspace import Workspace
from speechgpt.speech import audio
from speechgpt.speech.config import GeneratorSection
from speechgpt.speech.vocoder import UnitVocoder, Vocoder


@pytest.fixture
def recipe() -> Recipe:
    return load("tiny", ("language.dialect=paper",))


@pytest.fixture
def workspace(run_directory: Path, recipe: Recipe) -> Workspace:
    """Thirty clips, of which three are recordings and the last has lost its sound; rows of all; a published row."""
    made = Workspace(str(run_directory))
    clips = [Utterance(f"c{n}", (n % 32, 31 - n % 7, n % 5), f"word {n}", "c", f"answer {n}") for n in range(30)]
    builder = RowBuilder(
        PromptFormat("paper", ""), InstructionsSection(), 1, {f"answer {n}": (9, n) for n in range(30)}
    )
    write_part(made, "part-a.parquet", (item for clip in clips for item in builder.of_utterance(clip)))
    harmful = [WrittenQuestion(f"w{n}", "d", "What is bullshit?", "A word.") for n in range(3)]
    write_part(made, "text.parquet", (item for each in harmful for item in builder.of_question(each)))
    published = "[Human]: <sosp><1><2><eosp><eoh> [SpeechGPT]: Q; [ta] A<eoa>"
    write_part(made, "published.parquet", [Row("s2t-old-1", "s2t", "", published, "old", "train")])
    rows = [Row(**row) for row in made.read_table(ROWS).to_pylist()]
    made.write_json(REPORT, tally(rows))
    table = [
        {"utterance_id": clip.id, "units": clip.units, "seconds": 2.0, "speaker": "ann", "text": clip.text}
        for clip in clips
    ]
    made.write_table("units/part-a.parquet", pa.Table.from_pylist(table, UNITS_SCHEMA))
    flac = audio.encode(np.sin(np.arange(3200) * 0.3).astype(np.float32), "flac")
    made.write_table("speech/part-a.parquet", pa.table({"id": [f"c{n}" for n in range(26)], "audio": [flac] * 26}))
    recording = run_directory / "recording.flac"
    recording.write_bytes(flac)
    paths = [str(recording)] * 3 + [str(run_directory / "gone.flac")]
    made.write_table("manifest/utterances.parquet", pa.table({"id": [f"c{n}" for n in range(26, 30)], "path": paths}))
    made.write_json("instructions/_done/instructions.json", {"digest": "made by hand"})
    return made


def test_every_stretch_of_speech_is_heard_from_where_it_came(workspace: Workspace, recipe: Recipe):
    figures = execute(dataset_page.JOB, recipe, workspace, json=True)["figures"]
    page = workspace.read_bytes(PAGE).decode()
    # Questions are clips; answers are nobody's, and there is no vocoder to make them.
    assert figures["by_vocoder"] == 0 and figures["recordings"] > 0
    assert figures["rows"] == len(workspace.read_table(ROWS))
    assert page.count("the recording") == page.count("<audio") > 0
    assert "bullshit" not in page and figures["hidden"] == 3 * 2, "text and t2t of each"
    assert f"{figures['hidden']} drawn rows are not shown" in page
    assert not re.search(r"""src=["'](?!data:)""", page)


def test_what_no_clip_has_is_spoken_by_the_vocoder_once_it_is_trained(workspace: Workspace, recipe: Recipe):
    before = execute(dataset_page.JOB, recipe, workspace, json=True)
    assert before["figures"]["by_vocoder"] == 0
    assert execute(dataset_page.JOB, recipe, workspace, json=True)["skipped"]
    generator = GeneratorSection(
        embedding_dim=8,
        model_in_dim=8,
        upsample_initial_channel=64,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    with workspace.stage("vocoder") as directory:
        Vocoder(UnitVocoder(generator, 32)).save(directory)
    workspace.write_json("vocoder/_done/train-vocoder.json", {"digest": "made by hand"})
    figures = execute(dataset_page.JOB, recipe, workspace, json=True)["figures"]
    page = workspace.read_bytes(PAGE).decode()
    assert figures["by_vocoder"] > 0 and "by the vocoder" in page
    spoken = page.count('<span class="tag">question</span><code>') + page.count('<span class="tag">speech</span><code>')
    spoken += page.count('<span class="tag">aloud</span><code>')
    assert page.count("<audio") == spoken


def test_the_examples_are_the_same_however_rows_are_cut_into_parts(workspace: Workspace, recipe: Recipe):
    execute(dataset_page.JOB, recipe, workspace, json=True)
    before = workspace.read_bytes(PAGE)
    table = workspace.read_table(f"{ROWS}/part-a.parquet")
    workspace.delete(f"{ROWS}/part-a.parquet")
    for place, first in enumerate(range(0, len(table), 17)):
        workspace.write_table(f"{ROWS}/piece-{place}.parquet", table.slice(first, 17))
    workspace.delete("reports/_done/dataset-page.json")
    execute(dataset_page.JOB, recipe, workspace, json=True)
    assert workspace.read_bytes(PAGE) == before
