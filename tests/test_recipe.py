"""Recipes: what is wrong is said before any work starts, with the key and what would be right."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from speechgpt.recipe import Recipe, RecipeError, load, shipped
from speechgpt.section import Section


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load(name: str) -> None:
    assert load(name).name == name


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load("tiny")
    (tmp_path / "resolved.yaml").write_text(recipe.yaml())
    assert load(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.layr=3", r"encoder\.layr: unknown key"),
        ("stages.base.lora.ranc=3", r"stages\.base\.lora\.ranc: unknown key"),
        ("stages.warmup.steps=3", r"stages\.warmup.*'base', 'adaptation', 'crossmodal' or 'chain'"),
        ("codebook.clusters=one", r"codebook\.clusters: .*integer.*one"),
        ("codebook.clusters=1", r"codebook\.clusters: .*greater than or equal to 2"),
        ("stages.base.start_from=chain", r"stages\.base\.start_from: 'chain' is not an earlier stage"),
        ("voices.answer=nobody", r"voices\.answer: 'nobody' is not one of"),
        ("engine.precision=fp16", r"engine\.precision: fp16 needs GPUs"),
        ("serving.language.max_ongoing_requests=1", r"serving\.language: .*would never scale"),
        ("name=Two Words", "name: "),
        ("engine.workers=[1, 3]", r"stages\.base: a step of .* do not fall evenly"),
    ],
)
def test_what_is_wrong_is_named(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe tiny: (?!:).*{said}"):
        load("tiny", (override,))


@pytest.mark.parametrize("override", ["encoder.layer", "=3", "name.deep=3"])
def test_an_override_of_another_form_is_quoted(override: str) -> None:
    with pytest.raises(RecipeError, match=f"--set '{override}'"):
        load("tiny", (override,))


def test_later_overrides_win_and_values_are_yaml() -> None:
    recipe = load("tiny", ("seed=2", "seed=3", "data.extra_manifests=[a.jsonl, b.parquet]", "codebook.clusters=40"))
    assert (recipe.seed, recipe.codebook.clusters) == (3, 40)
    assert recipe.data.extra_manifests == ("a.jsonl", "b.parquet")


def _write(folder: Path, name: str, tree: dict[str, object]) -> Path:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder / f"{name}.yaml"


def test_extends_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    _write(tmp_path, "middle", {"extends": "tiny", "seed": 5, "codebook": {"clusters": 40}})
    child = _write(tmp_path, "child", {"extends": "middle", "name": "child", "codebook": {"iterations": 9}})
    recipe, tiny = load(child), load("tiny")
    assert (recipe.name, recipe.seed) == ("child", 5)
    assert (recipe.codebook.clusters, recipe.codebook.iterations) == (40, 9)
    assert recipe.codebook.frames == tiny.codebook.frames
    assert recipe.stages == tiny.stages


def test_extending_oneself_or_nothing_is_said(tmp_path: Path) -> None:
    _write(tmp_path, "a", {"extends": "b"})
    _write(tmp_path, "b", {"extends": "a"})
    with pytest.raises(RecipeError, match="extends itself"):
        load(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match="nowhere.*no such file.*tiny"):
        load(_write(tmp_path, "c", {"extends": "nowhere"}))


@pytest.mark.parametrize(("text", "said"), [("- a\n", "mapping of sections"), ("a: [", "not YAML"), ("", "voices")])
def test_files_that_are_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(RecipeError, match=rf"odd\.yaml.*{said}"):
        load(tmp_path / "odd.yaml")


SCRIPTS = {"adaptation": (3, 8, 1024, 5e-5), "crossmodal": (6, 12, 512, 2e-5), "chain": (12, 4, 1024, 2e-5)}
"""Blocks a GPU, accumulation, tokens, rate of the published scripts (SPEC 2.4)."""
PAPER = {"adaptation": (768, 900), "crossmodal": (1536, 4000), "chain": (128, 4200)}
"""Batch and steps of the paper (SPEC 1.5)."""


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_published_sizes_come_with_the_scripts_and_the_papers_settings(size: str) -> None:
    scripts = load("speechgpt-7b" if size == "7b" else "speechgpt-13b-scripts")
    paper = load("speechgpt-7b-paper" if size == "7b" else "speechgpt-13b")
    for name, stage in scripts.stages.items():
        assert (stage.micro_batch, stage.accumulation, stage.block, stage.learning_rate) == SCRIPTS[name]
    for name, stage in paper.stages.items():
        assert (stage.micro_batch * stage.accumulation * paper.engine.most_workers, stage.steps) == PAPER[name]
    for recipe, dialect, decoding in ((scripts, "released", (0.7, 50, 0.8)), (paper, "paper", (0.8, 60, 0.8))):
        assert recipe.language.base.endswith(f"llama-{size}")
        assert (recipe.language.dialect, recipe.language.markers, recipe.codebook.clusters) == (
            dialect,
            "released",
            1000,
        )
        lora = recipe.stages["chain"].lora
        assert lora and (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (
            8,
            16,
            0.05,
            ("q_proj", "v_proj"),
        )
        assert [stage.lora for stage in recipe.stages.values()][:2] == [None, None]
        generation = recipe.generation
        assert (generation.temperature, generation.top_k, generation.top_p) == decoding
        assert generation.max_new_tokens == 2048


def test_a_decoding_preset_gives_way_to_explicit_values(tmp_path: Path) -> None:
    paper = load("speechgpt-7b", ("generation.preset=paper",)).generation
    assert (paper.temperature, paper.top_k) == (0.8, 60)
    mixed = load("speechgpt-7b", ("generation.preset=paper", "generation.top_k=5", "generation.temperature=0"))
    assert (mixed.generation.temperature, mixed.generation.top_k, mixed.generation.top_p) == (0, 5, 0.8)
    (tmp_path / "resolved.yaml").write_text(mixed.yaml())
    assert load(tmp_path / "resolved.yaml") == mixed
    with pytest.raises(RecipeError, match=r"generation\.preset: .*'released' or 'paper'"):
        load("speechgpt-7b", ("generation.preset=authors",))


def _sections(model: type[Section], path: str = "") -> Iterator[tuple[str, Section]]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield f"{path}{name}", field.default
            yield from _sections(type(field.default), f"{path}{name}.")


@pytest.mark.parametrize(("path", "default"), _sections(Recipe))
def test_a_section_that_is_partly_given_keeps_its_defaults(path: str, default: Section) -> None:
    """What a recipe does not say of a section must not depend on whether it says anything of it."""
    assert default == type(default)(), f"{path}: its defaults hold only where nothing is set"
