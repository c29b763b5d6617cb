"""Recipe sections of the speech room."""

import math
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from speechgpt.section import Mark, Section


class DataSection(Section):
    """Recordings that enter the pipeline beside synthesised speech."""

    shipped_recordings: bool = True
    """Take the credited real recordings that come with the package."""
    extra_manifests: tuple[str, ...] = ()
    """Manifests (JSON Lines or Parquet, local or s3://) of the user's own recordings."""
    max_seconds: float = Field(30.0, gt=0)
    """Longer recordings go to quarantine, unless `encoder.long` says how to encode them."""
    spoken_text: bool = False
    """Bring transcripts to the form in which word errors are counted: lower case, no punctuation, numbers in words."""
    max_bad_fraction: Annotated[float, Mark.LIMIT] = Field(0.05, ge=0, le=1)
    """A job stops when more than this share of its input is in quarantine."""


class HttpServiceSection(Section):
    """A service with OpenAI's routes: a company's, a server of one's own, or ours."""

    url: str = Field(pattern=r"^https?://")
    """Up to the version: `https://host/v1`."""
    key_variable: Annotated[str, Mark.LIMIT] = Field("OPENAI_API_KEY", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    """Environment variable that holds the key, on every machine that asks; empty for a service that wants none."""
    timeout_seconds: Annotated[float, Mark.LIMIT] = Field(60, gt=0)
    retries: Annotated[int, Mark.LIMIT] = Field(6, ge=0)
    """Further attempts when it is busy (408, 409, 425, 429, 5xx) or cannot be reached, later each time."""

    @field_validator("url")
    @classmethod
    def _no_secret(cls, url: str) -> str:
        # A recipe is copied beside everything it makes.
        parts = urlsplit(url)
        if parts.password or parts.username or parts.query:
            raise ValueError("url: no name, password or query: a key is given in the variable key_variable names")
        return url


class SpeechServiceSection(HttpServiceSection):
    """What speaks, by `POST URL/audio/speech`. Without a key in `key_variable`, none is sent."""

    model: str = "tts-1"


class VoiceSection(Section):
    """One synthetic speaker."""

    engine: Literal["hibari", "kokoro", "espeak", "piper", "flite", "http", "tone"]
    """`tone` is not a voice: it spells letters as tones, instantly, for recipes that test the plumbing. `http` asks
    `service`, whose sound may differ from one asking to the next: clips that were spoken are kept, not asked for again.
    """
    service: SpeechServiceSection | None = None
    voice: str = "default"
    """The engine's name of the voice, e.g. `en-us+f2` for espeak, `am_michael` for kokoro."""
    speed: tuple[float, float] = (1.0, 1.0)
    """Speaking rate, drawn uniformly for each clip."""
    pitch: tuple[float, float] = (0.0, 0.0)
    """Shift in semitones, drawn uniformly for each clip."""
    share: float = Field(1.0, gt=0)
    """How often it is drawn, relative to the others: a slow engine speaks less."""
    examined: bool = True
    """Whether it asks the held-out questions, too."""

    @model_validator(mode="after")
    def _service_is_http_s(self) -> "VoiceSection":
        if (self.engine == "http") != (self.service is not None):
            raise ValueError("engine: http needs a `service`, and no other engine has one")
        return self


class VoicesSection(Section):
    """Who speaks: the questions, the answers, and the strangers that only evaluation hears."""

    questions: dict[str, VoiceSection]
    answer: str
    """The key of the voice that speaks the answers and trains the vocoder; one of `questions`."""
    held_out: dict[str, VoiceSection] = {}
    recorded: float = Field(0.0, ge=0, le=1)
    """Share of the training clips, those of the answer voice aside, that get pauses, a room, noise, a microphone."""
    clips_per_question: int = Field(3, ge=1)
    """Voices, drawn by the seed, that speak each training question."""

    @model_validator(mode="after")
    def _voices_exist(self) -> "VoicesSection":
        if self.answer not in self.questions:
            raise ValueError(f"voices.answer: {self.answer!r} is not one of voices.questions {sorted(self.questions)}")
        if both := set(self.questions) & set(self.held_out):
            raise ValueError(f"voices.held_out: {sorted(both)} also speak training questions")
        return self


class TeacherSection(Section):
    """Where the frame targets of a distilled encoder come from."""

    kind: Literal["whisper", "mfcc", "hubert"] = "whisper"
    path: str = ""
    """whisper: a CTranslate2 directory, empty takes the packaged Whisper-base; hubert: an encoder of a bundle."""
    clusters: int = Field(500, ge=2)
    frames: int = Field(60_000, ge=100)
    """Frames that the teacher's codebook is fitted on."""


class MaskingSection(Section):
    """HuBERT's own training: what was hidden is predicted from what was not (Hsu et al., 2021, section II)."""

    iterations: int = Field(2, ge=1)
    """The first predicts units of `teacher`, each further one those of the encoder before; all start from nothing."""
    start_probability: float = Field(0.08, gt=0, le=1)
    """That a hidden stretch begins at a frame."""
    span: int = Field(10, ge=1)
    """Frames of a hidden stretch; stretches may overlap."""
    layer: int = -1
    """Transformer layer, 1-based, whose frames are clustered for the next iteration; -1 is the last. HuBERT Base took
    6 of 12."""
    clusters: int = Field(500, ge=2, le=32767)
    """Of those frames; `teacher.clusters` are the first iteration's (HuBERT: 100 of MFCCs)."""
    projection: int = Field(256, ge=1)
    """Dimensions in which a frame is compared with the units."""
    temperature: float = Field(0.1, gt=0)


class EncoderTrainingSection(Section):
    objective: Literal["distil", "masked"] = "distil"
    """`distil`: hear what a stronger teacher hears; `masked`: HuBERT's own training, which needs recordings alone."""
    teacher: TeacherSection = TeacherSection()
    masked: MaskingSection = MaskingSection()
    steps: int = Field(2000, ge=1)
    """Of each iteration."""
    batch_seconds: float = Field(40.0, gt=0)
    """Seconds of audio in one optimiser step of one worker."""
    learning_rate: float = 1e-3
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products; weights and losses are fp32."""
    workers: int = Field(1, ge=1)
    """Each with `engine.cpus_per_worker` and `engine.gpus_per_worker`."""
    checkpoint_every: int = Field(200, ge=1)
    augment: float = Field(0.7, ge=0, le=1)
    """Share of clips whose speed, pitch, vocal-tract length, noise, room or band is changed for the student. HuBERT's
    own training has none."""


class LongAudioSection(Section):
    """How clips that are longer than `seconds` are encoded (see `speech/long_audio.py`)."""

    mode: Literal["overlapped", "pauses", "published"] = "overlapped"
    """`published`: the original's independent chunks, a seam at each end; `overlapped`: windows without a seam;
    `pauses`: cut where it is quietest, each piece a clip of its own, as an encoder of short clips expects it."""
    seconds: float = Field(100.0, ge=1)
    """Of a chunk, or of what is kept of a window, or the most of a piece. The original's chunks have 100."""
    context_seconds: float = Field(10.0, ge=0)
    """What an `overlapped` window hears beyond that, on either side. Memory grows with `seconds` and twice this. Of
    nano's units near boundaries 0.90 are the whole clip's with 5 s, 0.94 with 10, 0.96 with 15."""


class EncoderSection(Section):
    """The HuBERT-architecture model that gives frames at 50 Hz."""

    init: str = "shipped"
    """`shipped`, `scratch` (trained by `train-encoder`), a directory, s3:// or Hugging Face name."""
    layer: int = Field(-1)
    """Transformer layer whose output is clustered, 1-based; -1 is the last."""
    architecture: dict = {}
    """HubertConfig fields, for `scratch`."""
    batch_seconds: Annotated[float, Mark.LIMIT] = Field(60.0, gt=0)
    """Seconds of audio, padding included, in one forward pass."""
    long: LongAudioSection | None = None
    """Lets `tokenize` take clips of any length; without it those longer than `data.max_seconds` go to quarantine. The
    encoder and codebook are fitted to the shorter ones either way."""
    precision: Literal["float32", "bfloat16x3", "bfloat16"] = "float32"
    """Of `tokenize` on CPUs; the encoder of a bundle stays float32. bfloat16x3 is float32 from products of bfloat16,
    for Intel's AMX: the same units but where two centroids are equally near. In bfloat16 a few units in a hundred
    become others (`speechgpt bench encode`)."""
    training: EncoderTrainingSection = EncoderTrainingSection()


class CodebookSection(Section):
    init: str = "fit"
    """`fit`; `shipped`, that of the shipped encoder, so that a part can be trained anew beside others that know its
    units; or a directory with `kmeans.safetensors`, such as a published codebook that was converted."""
    clusters: int = Field(500, ge=2, le=32767)
    frames: int = Field(100_000, ge=100)
    """Frames sampled from the corpus for the fit."""
    iterations: int = Field(30, ge=1)


class GeneratorSection(Section):
    """Unit vocoder; the defaults are CodeHiFiGAN's published ones (SPEC 4.1)."""

    head: Literal["hifigan", "istft"] = "hifigan"
    embedding_dim: int = 128
    model_in_dim: int = 128
    upsample_rates: tuple[int, ...] = (5, 4, 4, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 8, 8, 4, 4)
    upsample_initial_channel: int = 512
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    speakers: int = Field(0, ge=0)
    """0: one speaker and no speaker embedding."""
    durations: bool = True
    """Predict how long each merged unit lasts; without, a vocoder speaks units of 20 ms, or is told their lengths."""
    rounding: Literal["unit", "running"] = "unit"
    """Of predicted durations to whole frames. unit: each for itself, as published. running: the units' ends are
    rounded, so that what one is too long the next is shorter, and speech keeps its pace. No weight depends on it."""
    istft_channels: int = 256
    istft_blocks: tuple[int, int] = (8, 4)
    """ConvNeXt blocks at 50 Hz and at 200 Hz."""
    istft_kernel: int = Field(9, ge=1)
    """Frames that each block at 50 Hz looks at."""

    @model_validator(mode="after")
    def _widths_fit(self) -> "GeneratorSection":
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes):
            raise ValueError("upsample_rates and upsample_kernel_sizes differ in length")
        if (hop := math.prod(self.upsample_rates)) != 320:
            raise ValueError(f"upsample_rates multiply to {hop} samples a unit frame; 320 (20 ms at 16 kHz) is needed")
        wanted = self.embedding_dim * (2 if self.speakers else 1)
        if self.model_in_dim != wanted:
            raise ValueError(f"model_in_dim must be {wanted}: embedding_dim, doubled when there is a speaker embedding")
        return self


class VocoderTrainingSection(Section):
    steps: int = Field(500, ge=0)
    adversarial_from: int = Field(0, ge=0)
    """Step at which the discriminators join."""
    batch: int = Field(16, ge=1)
    segment_units: int = Field(28, ge=8)
    """Frames of 20 ms that the discriminators judge of a clip; 28 is the published 8960 samples."""
    clip_units: int = Field(28, ge=8)
    """Frames that are made of a clip, at most: the more, the more often what is said is seen whole."""
    learning_rate: float = 2e-4
    duration_steps: int = Field(0, ge=0)
    """Further steps, after the others, in which the durations alone are learnt: they take more clips than the sound
    does, and hardly any time."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products; weights, spectra and losses are fp32."""
    checkpoint_every: int = Field(200, ge=1)
    workers: int = Field(1, ge=1)
    codebooks: tuple[int, ...] = ()
    """Sizes of further codebooks to train on, so that the vocoder can be fitted to one it has not seen."""
    strangers: float = Field(0.0, ge=0, le=1)
    """Share of the clips whose units are not their own, while the sound to make stays: those of another voice that says
    the same, moved to when this one says it, or of the clip in another throat and room."""
    paced: float = Field(0.0, ge=0, le=1)
    """Share of the steps in which the units last as long as predicted, as when served, beside spectra moved to that."""
    likeness: float = Field(0.0, ge=0)
    """Weight of how alike the encoder hears the clip and what was made of it. The published training has none."""
    discriminators: Literal["hifigan", "stft"] = "hifigan"
    """`hifigan`: the published multi-period and multi-scale ones; `stft`: light multi-resolution ones, for CPUs."""
    mel_resolutions: tuple[tuple[int, int, int], ...] = ((1024, 256, 80),)
    """(window, hop, mel bands) of the spectral loss; the default is the published one."""


class VocoderSection(Section):
    init: str = "shipped"
    """`shipped`, `scratch`, or a vocoder directory."""
    recorded: tuple[str, ...] = ()
    """Speakers of the manifest's recordings whose voices it learns, in the order of their numbers, instead of
    `voices.answer` and the other synthesised ones."""
    generator: GeneratorSection = GeneratorSection()
    training: VocoderTrainingSection = VocoderTrainingSection()

    @model_validator(mode="after")
    def _paces_are_predicted(self) -> "VocoderSection":
        if self.training.paced and not self.generator.durations:
            raise ValueError("training.paced: units are made at predicted lengths; generator.durations predicts none")
        return self
