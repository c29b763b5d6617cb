"""One run's whole configuration, put together from the sections that each room defines for itself."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from speechgpt.evaluation.config import EvaluationSection, InstructionFollowingSection
from speechgpt.language.config import (
    GenerationSection,
    InstructionsSection,
    LanguageSection,
    WorldSection,
)
from speechgpt.runtime.config import CorporaSection, ResourcesSection, ServingSection, TrackingSection
from speechgpt.section import Section
from speechgpt.speech.config import (
    CodebookSection,
    DataSection,
    EncoderSection,
    VocoderSection,
    VoicesSection,
)
from speechgpt.training.config import EngineSection, StageName, StageSection, TextToUnitSection
from speechgpt.training.elastic import misfit


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the file and key."""


class Recipe(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = 1
    data: DataSection = DataSection()
    corpora: CorporaSection = CorporaSection()
    world: WorldSection = WorldSection()
    voices: VoicesSection
    encoder: EncoderSection = EncoderSection()
    codebook: CodebookSection = CodebookSection()
    language: LanguageSection = LanguageSection()
    instructions: InstructionsSection = InstructionsSection()
    text_to_unit: TextToUnitSection = TextToUnitSection()
    engine: EngineSection = EngineSection()
    stages: dict[StageName, StageSection]
    vocoder: VocoderSection = VocoderSection()
    generation: GenerationSection = GenerationSection()
    evaluation: EvaluationSection = EvaluationSection()
    instruction_following: InstructionFollowingSection = InstructionFollowingSection()
    tracking: TrackingSection = TrackingSection()
    resources: ResourcesSection = ResourcesSection()
    serving: ServingSection = ServingSection()

    @model_validator(mode="after")
    def _codebook_is_the_encoder_s(self) -> "Recipe":
        if self.codebook.init == "shipped" and self.encoder.init != "shipped":
            raise ValueError(
                "codebook.init: the shipped codebook is of the shipped encoder's frames; encoder.init is not"
            )
        return self

    @model_validator(mode="after")
    def _stages_follow(self) -> "Recipe":
        seen: set[str] = set()
        for name, stage in self.stages.items():
            if stage.start_from and stage.start_from not in seen:
                earlier = sorted(seen)
                raise ValueError(f"stages.{name}.start_from: {stage.start_from!r} is not an earlier stage {earlier}")
            seen.add(name)
        return self

    @model_validator(mode="after")
    def _steps_fall_evenly_on_the_workers(self) -> "Recipe":
        for name, stage in self.stages.items():
            if problem := misfit(stage, self.engine):
                raise ValueError(f"stages.{name}: {problem}")
        return self

    @model_validator(mode="after")
    def _int8_bases_stay_whole(self) -> "Recipe":
        for name, stage in self.stages.items():
            if stage.lora and stage.lora.base == "int8" and self.engine.zero_stage == 3:
                raise ValueError(
                    f"stages.{name}.lora.base: int8 weights cannot be sharded; engine.zero_stage 2, or base full"
                )
        return self

    def yaml(self) -> str:
        """The resolved recipe, as it is saved beside what it made."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(source: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file by path; apply `a.b=c` overrides.

    Raises RecipeError naming the file, the key and what would be right.
    """
    return resolved(_read(str(source)), overrides, str(source))


def resolved(tree: dict[str, Any], overrides: tuple[str, ...], name: str) -> Recipe:
    """The recipe of these sections with `a.b=c` overrides; `name` is for errors. Raises RecipeError, as `load` does."""
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        # What concerns several sections has no place of its own, and names its keys itself.
        lines = [": ".join(filter(None, (".".join(map(str, e["loc"])), _explain(e)))) for e in error.errors()]
        raise RecipeError(f"recipe {name}: " + "; ".join(lines)) from None


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("speechgpt").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read(source: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(source)
    if source in shipped():
        path = Path(str(resources.files("speechgpt").joinpath("recipes", f"{source}.yaml")))
    if not path.is_file():
        raise RecipeError(f"recipe {source!r}: no such file, and not one of the shipped recipes {shipped()}")
    if str(path) in seen:
        raise RecipeError(f"recipe {source}: extends itself through {' -> '.join(seen)}")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {source}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {source}: a mapping of sections is expected, not {type(tree).__name__}")
    if parent := tree.pop("extends", None):
        beside = path.parent / f"{parent}.yaml" if not str(parent).endswith(".yaml") else path.parent / parent
        tree = _merge(_read(str(beside) if beside.is_file() else str(parent), (*seen, str(path))), tree)
    return tree


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else is replaced whole."""
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: expected section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is a value, not a section")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: {text!r} is not a YAML value: {error}") from None


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "value_error":
        # A check of ours, which says what is wrong in its own words; what was given may be a secret.
        return error["msg"].removeprefix("Value error, ")
    return f"{error['msg']} (got {json.dumps(error['input'], default=str)[:80]})"
