"""Recipe sections of the training room."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from speechgpt.section import Mark, Section

Workers = Annotated[int, Field(ge=1)]
StageName = Literal["base", "adaptation", "crossmodal", "chain"]
"""`base` gives a from-scratch model its text; the other three are the paper's stages 1, 2 and 3."""
Offload = Literal["none", "cpu", "nvme"]
RowKind = Literal["text", "units", "transcribe", "speak", "s2s", "s2t", "t2s", "t2t", "direct", "standard"]


class LoraSection(Section):
    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    base: Literal["full", "int8"] = "full"
    """`int8`: the frozen base in eight bits a weight, as in the authors' stage 3 (by bitsandbytes; ZeRO 0 to 2)."""


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
    unit_noise: float = Field(0.0, ge=0, le=0.5)
    """Share of the units that are heard and not learnt (`loss_on: reply`) that come as a near one instead, drawn anew
    each time a row is: what another voice does to them. No two in a row, so a little fewer do."""
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


class TextToUnitSection(Section):
    """The model that writes the units of a text: the voice of `instructions.questions.spoken_by: text-to-unit`."""

    init: str = "train"
    """`train`, on this run's units and texts; or a directory, such as `speechgpt convert` makes of a published one."""
    speakers: Literal["answer", "all"] = "answer"
    """Whose clips it learns from: the answer voice's alone, or everybody's (a corpus without that voice needs it)."""
    text_vocabulary: int = Field(1000, ge=260)
    """Size of the byte-level BPE of its texts."""
    architecture: dict = {}
    """BartConfig fields; the default is a model of 10 million parameters."""
    steps: int = Field(5000, ge=1)
    batch_tokens: int = Field(8000, ge=100)
    """Tokens of units, padding included, in one step of one worker."""
    learning_rate: float = Field(5e-4, gt=0)
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps; after it the rate falls to zero in a line."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    held_out: int = Field(200, ge=1)
    """Pairs, at most a tenth, that are kept for measuring."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products; weights and losses are fp32."""
    workers: int = Field(1, ge=1)
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    checkpoint_every: int = Field(500, ge=1)
    beams: int = Field(1, ge=1)
    """Beams that it writes with; the authors took 5."""
    max_units: int = Field(1000, ge=1)
    """A text that has not ended after so many units is refused."""


class EngineSection(Section):
    """How the stages run: workers, precision, DeepSpeed ZeRO."""

    workers: Workers | tuple[Workers, Workers] = 2
    """How many; or `[least, most]`: as many as the cluster has room for, more or fewer as nodes come and go. A step's
    blocks are those of the most workers, whatever the number that shares them."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    offload: Offload = "none"
    """Where the optimiser's state lies, and under ZeRO-3 the weights, while no layer needs them."""
    nvme_path: str = ""
    """For `offload: nvme` (ZeRO-3): a directory on each node's local disk."""
    gradient_checkpointing: bool = False
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    max_failures: Annotated[int, Mark.LIMIT] = 3
    """Times that a stage is taken up again after a failed worker; preempted nodes do not count."""
    collective_timeout_seconds: Annotated[int, Mark.LIMIT] = Field(1800, ge=1)
    """A rank that keeps the others waiting for longer is taken for hung: the workers fail and start again from the
    newest checkpoint. Must cover the longest waits there are: for the first worker to convert a checkpoint for another
    number of them, and for the model to be written."""
    resize_seconds: Annotated[float, Mark.LIMIT] = Field(60, ge=1)
    """How often an elastic stage looks whether it could have another number of workers."""

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _range_is_one(self) -> "EngineSection":
        if self.least_workers > self.most_workers:
            raise ValueError(
                f"engine.workers: [{self.least_workers}, {self.most_workers}] is [least, most]; the least comes first"
            )
        return self

    @model_validator(mode="after")
    def _precision_fits(self) -> "EngineSection":
        if self.precision == "fp16" and not self.gpus_per_worker:
            raise ValueError("engine.precision: fp16 needs GPUs (engine.gpus_per_worker > 0); on CPUs use fp32 or bf16")
        return self

    @model_validator(mode="after")
    def _offload_fits(self) -> "EngineSection":
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(
                f"engine.offload: {self.offload} needs engine.zero_stage 1, 2 or 3; nothing is sharded at 0"
            )
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError("engine.offload: nvme needs engine.zero_stage 3; below it DeepSpeed offloads to cpu only")
        if (self.offload == "nvme") != bool(self.nvme_path):
            raise ValueError(
                "engine.nvme_path: offload nvme needs a directory on each node's disk, no other offload does"
            )
        return self
