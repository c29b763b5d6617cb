"""Recipe sections of the training room."""

from typing import Literal

from pydantic import Field, model_validator

from speechgpt.section import Section

StageName = Literal["base", "adaptation", "crossmodal", "chain"]
"""`base` gives a from-scratch model its text; the other three are the paper's stages 1, 2 and 3."""
RowKind = Literal["text", "units", "transcribe", "speak", "s2s", "s2t", "t2s", "t2t"]


class LoraSection(Section):
    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


class StageSection(Section):
    start_from: str = ""
    """Name of the stage whose model this one continues; empty starts from the base model."""
    mixture: dict[RowKind, float]
    """How often each kind of row is drawn, relative to the others; categories come evenly in `text` and the forms."""
    steps: int = Field(ge=1)
    block: int = Field(512, ge=16)
    """Tokens in a packed block."""
    micro_batch: int = Field(4, ge=1)
    """Blocks in one forward pass of one worker."""
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.03, ge=0, le=1)
    """Share of the steps."""
    hold: float = Field(0.0, ge=0, le=1)
    """Share of the steps that stay at the full rate before decay begins."""
    weight_decay: float = 0.0
    clip: float = 1.0
    loss_on: Literal["all", "reply"] = "all"
    """`all`: all but the row's prefix is learnt, the user's part too, as the authors did (SPEC 1.5); `reply`: only what
    follows `[SpeechGPT]` (rows without it, such as bare units, are learnt whole)."""
    unit_weight: float = Field(1.0, ge=0)
    """Weight of a unit token's loss against a text token's."""
    lora: LoraSection | None = None
    checkpoint_every: int = Field(300, ge=1)
    keep: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0)
    """Steps between looks at held-out rows, and at the end; 0: none."""
    validation_rows: int = Field(256, ge=1)
    """Rows of each kind that are held out, if the rows' `split` holds none out: at most these, or a twentieth."""
    answers: int = Field(4, ge=0)
    """Held-out prompts, the same at every look, whose answers MLflow shows with transcript and sound."""
    patience: int = Field(0, ge=0)
    """Looks without a lower validation loss after which the stage ends early; 0: it never does."""
    leave: Literal["last", "best"] = "last"
    """Which model the stage ends with: the last step's, or that of the lowest validation loss."""

    @model_validator(mode="after")
    def _who_judges_looks(self) -> "StageSection":
        if not self.validate_every and (self.patience or self.leave == "best"):
            raise ValueError("validate_every: patience and leave: best need validation; say after how many steps")
        return self


class EngineSection(Section):
    """How the stages run: workers, precision, DeepSpeed ZeRO."""

    workers: int = Field(2, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload: Literal["none", "cpu"] = "none"
    gradient_checkpointing: bool = False
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    max_failures: int = 3

    @model_validator(mode="after")
    def _precision_fits(self) -> "EngineSection":
        if self.precision == "fp16" and not self.gpus_per_worker:
            raise ValueError("engine.precision: fp16 needs GPUs (engine.gpus_per_worker > 0); on CPUs use fp32 or bf16")
        return self
