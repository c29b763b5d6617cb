"""Recipe sections of the language room."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from speechgpt.section import Section

Dialect = Literal["released", "paper"]
TextForm = Literal["written", "spoken"]
"""As it stands; or as `language.normaliser` has it: lower case, numbers in words, no signs, since sound has none."""
ReplyForm = Literal["chain", "direct", "text"]
"""chain: transcript, text answer, spoken answer; direct: no transcript; text: no speech."""


class LanguageSection(Section):
    """The base model and how its vocabulary grows."""

    base: str = "scratch"
    """`scratch`, a directory, a .gguf file, s3:// or a Hugging Face name of a causal language model,
    `smollm2-135m-instruct` as it comes in a package, or `shipped`: nano's own, with the units that it knows."""
    architecture: dict = {}
    """LlamaConfig fields, for `scratch`; for another base its own shape, `vocab_size` too, which only `plan` reads."""
    text_vocabulary: int = Field(800, ge=260)
    """Size of the byte-level BPE that `scratch` trains on the recipe's own texts."""
    markers: Literal["released", "whole"] = "whole"
    """`released`: exactly the published weights' tokens; `whole`: also `<eoa> [tq] [ta] [ua]` as one token each."""
    pad_vocabulary_to: int = Field(64, ge=1)
    unit_init: Literal["random", "centroids"] = "centroids"
    dialect: Dialect = "paper"
    text: TextForm = "written"
    """What it reads, in training and in what users type. `spoken` is all that a small model of a closed world knows."""
    prefix: Literal["", "speechgpt"] = "speechgpt"
    """What every row and prompt begins with: the published description of SpeechGPT (about 100 tokens), or nothing."""


class WorldSection(Section):
    """The closed world of questions and answers that `nano` learns."""

    file: str = "nano"
    """A shipped world, or a path to a YAML file of the same form."""
    max_questions: int = Field(0, ge=0)
    """0 takes all."""
    wordings: Literal["few", "all"] = "few"
    """`all` also asks in the wordings that topics name under `also`."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the questions that no training sees."""
    readings: int = Field(300, ge=0)
    """General sentences, read aloud, for recognition and the vocoder."""
    word_lists: int = Field(0, ge=0)
    """Lists of the world's words in random order, read aloud: only who hears each word can write it down, and a voice
    learns them all alike."""


class FiltersSection(Section):
    """Which published rows are refused.

    Each reason is counted in `instructions/report.json`, with a few ids; `instructions/refused.parquet` has the ids of
    all. Rows whose markers are broken are always refused."""

    harmful: bool = True
    """Insults, violence, sexual content, self-harm, crime: the word and pattern lists of `language/row_filter.yaml`."""
    personal: bool = True
    """E-mail and street addresses, phone, card and account numbers, and requests for somebody's."""
    style: bool = True
    """Requests that units cannot carry, where the reply is speech: sing, whisper, louder, in the voice of somebody."""
    long_answers: bool = True
    """Chain-of-modality rows whose answer has `max_answer_words` words or more."""
    over_block: bool = True
    """Rows that certainly have more tokens than the longest block of any stage that draws their kind."""
    unit_range: bool = True
    """Rows with a unit that the codebook does not have."""
    repeated_units: bool = True
    """Rows with two equal units side by side: units are merged, so such a row was made by other rules."""
    units: int = Field(0, ge=0, le=32767)
    """Size of the codebook that the rows' units are of; 0 takes `codebook.clusters`."""


SpokenLanguage = Literal[
    "ar", "de", "el", "en", "es", "fr", "he", "hi", "it", "ja", "ko", "nl", "pt", "ru", "th", "uk", "zh"
]
"""Languages that `language/spoken_language.py` tells apart, by ISO 639-1."""


class QuestionsSection(Section):
    """Sets of text questions and answers that become spoken ones.

    What is refused is counted in `instructions/report.json` for each file, by one reason a row, so that the counts add
    up to the file's rows; `instructions/refused.parquet` has them all."""

    files: tuple[str, ...] = ()
    """JSON Lines (`.jsonl`, `.json`, perhaps with `.gz`) or Parquet, local or s3://. A row has a question and an
    answer, or `turns`: a list of such pairs or of chat messages (`role, content` or `from, value`). `category` and
    `language` count if they are there."""
    question: str = Field("question", min_length=1)
    """Key of the question; other sets say `instruction` or `prompt`."""
    answer: str = Field("answer", min_length=1)
    turns: str = Field("messages", min_length=1)
    """Key of the list of turns, in rows that have one."""
    spoken_by: Literal["voices", "text-to-unit"] = "voices"
    """`voices`: the recipe's speak them, and the recordings are tokenised; `text-to-unit`: a model writes the units
    (`text_to_unit`), as the authors did; no sound is made."""
    language: SpokenLanguage | None = "en"
    """Rows in another language are refused; null takes all."""
    harmful: bool = True
    """As in `filters`."""
    personal: bool = True
    style: bool = True
    duplicates: bool = True
    """Refuse a row whose questions, but for case and punctuation, were asked by an earlier one."""
    max_question_words: int = Field(60, ge=1)
    history: int = Field(3, ge=0)
    """Earlier turns of its dialogue, at most, that a row remembers, as text."""

    @field_validator("files")
    @classmethod
    def _names_say_the_form(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for file in files:
            if not file.removesuffix(".gz").endswith((".jsonl", ".json")) and not file.endswith(".parquet"):
                raise ValueError(f"{file}: a name ending in .jsonl or .json, perhaps with .gz, or .parquet is expected")
        return files


class InstructionsSection(Section):
    questions: QuestionsSection = QuestionsSection()
    text_instructions: tuple[str, ...] = ()
    """JSON Lines of `instruction, response`: for the text-only rows of stage 2, and chain-of-modality rows where the
    answer voice happens to have said the answer. A set that is to be spoken belongs into `questions`, whose `language`,
    `harmful`, `personal` and `duplicates` hold here, too, and are counted alike."""
    published: tuple[str, ...] = ()
    """SpeechInstruct files (`.jsonl`, or JSON Lines named `.json`: objects with `prefix, plain_text`) and stage-1 files
    (`.txt`: one `<sosp>…<eosp>` a line), each perhaps with `.gz` after it; local or s3://."""
    rewrite_published: bool = False
    """Write published rows anew, in this recipe's dialect and with its prefix; otherwise they stay byte for byte."""
    own: bool = True
    """Make rows from this run's own units and world, too. Without them `published` or `text_instructions` is needed."""
    filters: FiltersSection = FiltersSection()
    max_answer_words: int = Field(35, ge=1)
    """The paper keeps answers of fewer words than this."""
    transcribe_probability: float = Field(0.5, ge=0, le=1)
    """The paper's p: a unit-text pair becomes a recognition row with p, a speaking row with 1 - p."""
    forms: tuple[Literal["s2s", "s2t", "t2s", "t2t", "direct", "standard"], ...] = ("s2s", "s2t", "t2s", "t2t")
    """Speech or text in, speech or text out; `direct` is s2s without the transcript: the answer begins sooner;
    `standard` is s2s without any text, which shows what the chain is worth. A stage that is to learn them names them in
    its mixture."""
    descriptions: int = Field(100, ge=1, le=100)
    """Wordings of the recognition task, and of the speaking task, that are drawn from; the paper has 100 of each."""
    multi_turn: float = Field(0.0, ge=0, le=1)
    """Share of chain-of-modality rows that join two dialogues."""

    @field_validator("published")
    @classmethod
    def _names_say_the_form(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for file in files:
            if not file.removesuffix(".gz").endswith((".jsonl", ".json", ".txt")):
                raise ValueError(f"{file}: a name ending in .jsonl, .json or .txt, perhaps with .gz, is expected")
        return files

    @model_validator(mode="after")
    def _there_is_something_to_learn(self) -> "InstructionsSection":
        if not self.own and not (self.published or self.text_instructions or self.questions.files):
            raise ValueError("own: false leaves no rows: name files in published, text_instructions or questions.files")
        if not self.own and self.questions.files and self.questions.spoken_by == "voices":
            raise ValueError(
                "own: false leaves out what the voices say, and questions.spoken_by is voices: set it to text-to-unit"
            )
        if both := set(self.text_instructions) & set(self.questions.files):
            raise ValueError(
                f"{sorted(both)[0]} is in text_instructions and in questions.files; the latter give text rows, too"
            )
        return self


PRESETS: dict[str, dict[str, float]] = {
    # What the published console really calls; its `min_new_tokens` 10 has no effect there, for want of an end token.
    "released": {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "max_new_tokens": 2048},
    # The paper's, which the console keeps in an unused constant (there with 1024 tokens).
    "paper": {"temperature": 0.8, "top_k": 60, "top_p": 0.8, "max_new_tokens": 2048},
}
"""Decoding as published (SPEC 0, 1.5, 2.5)."""


class GenerationSection(Section):
    """Decoding. Temperature 0 is greedy."""

    preset: Literal["released", "paper"] = "released"
    """Where the values come from that are not given one by one: released 0.7 / 50 / 0.8, paper 0.8 / 60 / 0.8."""
    temperature: float = Field(0.7, ge=0)
    top_k: int = Field(50, ge=0)
    top_p: float = Field(0.8, gt=0, le=1)
    max_new_tokens: int = Field(2048, ge=1)
    max_text_tokens: int = Field(256, ge=1)
    """Tokens outside `<sosp>…<eosp>` before an answer is cut."""

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(name := given.get("preset"), str) and name in PRESETS:
            return PRESETS[name] | given
        return given
