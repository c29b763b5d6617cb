"""The gateway: OpenAI's routes over one bundle's deployments, as a Serve application of its own."""

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Annotated, Any, NamedTuple

from fastapi import FastAPI, Form
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from serve import visits, wire
from serve.errors import FULL_HEADER, ApiError, from_http, from_validation
from serve.events import (
    chat_events,
    live_speech_events,
    speech_bytes,
    speech_events,
    told_of_faults,
    transcript_events,
)
from serve.guard import ApiKey, BodyLimit, Ending, Guard
from serve.keys import KeyRing
from serve.limits import Counting, SharedLimits
from serve.memory import SharedMemory
from serve.meters import Meters
from serve.metrics import collect, exporters
from serve.pipeline import ServedPipeline
from serve.prompting import Reply
from serve.readiness import Readiness
from serve.realtime.places import Places, told_to_stop
from serve.realtime.route import add_route
from serve.reports import Reporter
from serve.service import LANGUAGE, PCM_RATE, ChatAnswer, Served, Service, WrittenSpeech
from serve.subtitles import srt, vtt
from serve.switch import Route, Switch, Target
from serve.tally import Tallied, Tally
from serve.visits import Visit
from speechgpt.language.config import GenerationSection
from speechgpt.runtime.config import ServingSection

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": wire.ErrorReply, "description": "The request is refused."},
    "5XX": {"model": wire.ErrorReply, "description": "The service cannot answer."},
}
_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_SOUND = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in wire.MEDIA_TYPES.values()}
_TEXTS = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/x-subrip", "text/vtt")}
"""What /openapi.json says of replies that are no JSON."""
FINISH_HEADER = "x-speechgpt-finish-reason"


class Access(NamedTuple):
    """Who may use the service, and the count of what they use."""

    keys: KeyRing
    limits: Counting


@dataclass(frozen=True)
class Settings:
    """What a gateway was made with; with the same again, Serve changes its `user_config` and restarts nothing.

    version: of its deployment.
    """

    serving: ServingSection
    generation: GenerationSection
    key_hash: str | None
    version: str


@serve.ingress()
class Gateway:
    def __init__(
        self,
        serving: ServingSection,
        generation: GenerationSection,
        key_hash: str | None,
        _bundle: DeploymentHandle | None = None,
    ) -> None:
        """key_hash: see `keys.hash_key`; without it and `serving.keys` everybody is let in. _bundle: by which one
        belongs to the gateway's own application.

        Raises KeysError."""
        self._serving = serving
        self._generation = generation
        self._key_hash = key_hash
        self._memory = SharedMemory(serving.memory_seconds, serving.memory_answers)
        self._awaited: list[SharedMemory | SharedLimits] = [self._memory]
        self._access: Access | None = None
        if key_hash or serving.keys:
            limits = SharedLimits()
            self._awaited.append(limits)
            self._access = Access(KeyRing(serving.keys, key_hash, serving.keys_refresh_seconds), limits)
        self._meters = Meters()
        self._places = _places(serving, told_to_stop, self._meters)
        self._tally = Tally()
        self._switch = Switch(self._tally, self._service)
        self._reporter = Reporter(serve.get_replica_context().replica_tag, self._tally)

    async def reconfigure(self, target: Target) -> None:
        # Before the first request: Serve calls a replica ready when this has returned.
        while self._awaited:
            await self._awaited.pop().started()
        self._switch.turn(target)
        own = serve.get_replica_context().app_name
        self._readiness = Readiness({own, target["serving"]["application"] or own})
        self._target = target
        self._reporter.follow(target["watch"])

    def target(self) -> Target:
        """What this replica goes by."""
        return self._target

    def settings(self) -> Settings:
        """Of this replica's deployment."""
        version = serve.get_replica_context().code_version or ""
        return Settings(self._serving, self._generation, self._key_hash, version)

    def _service(self, name: str, route: Route) -> Service:
        application = route["application"] or serve.get_replica_context().app_name
        pipeline = ServedPipeline.of(application, self._serving.retry_after_seconds)
        served = Served(name, route["digest"], route["created"], tuple(route["adapters"]))
        tallied = Tallied(pipeline, route["digest"], self._tally, self._meters)
        return Service(served, tallied, self._memory, self._serving, self._generation)

    def _ended(self, visit: Visit, ending: Ending) -> None:
        self._tally.end(visit, ending.status)
        if visit.kind == "request":
            self._meters.request(ending.route, ending.status, ending.seconds, gone=ending.gone)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self._switch.service,
            lambda: self._readiness.missing(),
            self._serving,
            self._access,
            self._places,
            digest=self._switch.digest,
            ended=self._ended,
        )


def create_app(
    service: Callable[[], Service],
    missing: Callable[[], list[str]],
    serving: ServingSection,
    access: Access | None,
    places: Places | None = None,
    *,
    digest: Callable[[], str] | None = None,
    ended: Callable[[Visit, Ending], None] = lambda visit, ending: None,
) -> FastAPI:
    """service: the current visit's; asked for at each request, because a promotion changes it. missing: deployments
    that are not ready. access: None lets everybody in. places: for sessions; None makes a replica's that is never told
    to stop. digest: of the bundle that a reply comes from. ended: see `Guard`."""
    app = FastAPI(title="SpeechGPT", docs_url=None, redoc_url=None, responses=_ERRORS)
    largest = serving.realtime.max_message_bytes
    app.add_middleware(BodyLimit, max_bytes=serving.max_body_bytes, max_message_bytes=largest)
    if access:
        lease = serving.request_timeout_seconds
        app.add_middleware(ApiKey, keys=access.keys, limits=access.limits, lease_seconds=lease)
    app.add_middleware(
        Guard,
        bundle=digest or (lambda: service().served.digest),
        deadline_seconds=serving.request_timeout_seconds,
        ended=ended,
    )
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, lambda _, error: from_validation(error).response())
    app.add_exception_handler(HTTPException, lambda _, error: from_http(error).response())
    page = resources.files("serve").joinpath("web", "index.html").read_text("utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def web_page() -> str:
        return page

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The gateway is alive."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Some have none.", "content": {"application/json": {}}}})
    async def readyz() -> JSONResponse:
        """Every deployment has a warm replica."""
        waiting_for = await asyncio.to_thread(missing)
        status = "waiting" if waiting_for else "ready"
        return JSONResponse({"status": status, "waiting_for": waiting_for}, 503 if waiting_for else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Ray's metrics, all nodes and replicas."""
        page = await collect(await asyncio.to_thread(exporters))
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> wire.ModelList:
        served = service().served
        return wire.ModelList(data=[_model(served, name) for name in (served.name, *served.adapters)])

    @app.get("/v1/models/{model}")
    async def get_model(model: str) -> wire.Model:
        return _model(service().answering_as(model).served, model)

    @app.post("/v1/chat/completions", response_model=wire.ChatCompletion, responses={200: {"content": _EVENTS}})
    async def chat_completions(request: wire.ChatRequest) -> Response | wire.ChatCompletion:
        current = service().answering_as(request.model)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"fp_{current.served.digest[:12]}",
        }
        reading = partial(_reading, request)
        if request.stream:
            told = request.stream_options is not None and request.stream_options.include_usage
            live = await current.chat_live(request)
            usage = (lambda reply: _usage(reply).model_dump()) if told else None
            return _live(chat_events(head, live, usage, reading))
        answer = await current.chat(request)
        reply = answer.reply
        return wire.ChatCompletion(**head, choices=[_choice(answer)], usage=_usage(reply), speechgpt=reading(reply))

    @app.post("/v1/audio/speech", response_class=Response, responses={200: {"content": _SOUND | _EVENTS}})
    async def audio_speech(request: wire.SpeechRequest) -> Response:
        current = service().answering_as(request.model)
        media_type = wire.MEDIA_TYPES[request.response_format]
        if request.response_format == "pcm":
            media_type = f"{media_type};rate={request.sample_rate or PCM_RATE}"
        if request.response_format in ("pcm", "mp3", "opus", "aac"):
            pieces = await current.speak_live(request)
            if request.stream_format == "sse":
                return _live(live_speech_events(pieces, _speech_usage))
            return StreamingResponse(speech_bytes(pieces), media_type=media_type)
        said = await current.speak(request)
        if request.stream_format == "sse":
            return _stream(speech_events(said.data, said.reply, _speech_usage))
        return Response(said.data, media_type=media_type, headers=_finish(said.reply))

    @app.post(
        "/v1/audio/transcriptions",
        response_model=wire.Transcript | wire.VerboseTranscript,
        responses={200: {"content": _TEXTS | _EVENTS}},
    )
    async def audio_transcriptions(
        form: Annotated[wire.TranscriptionRequest, Form(media_type="multipart/form-data")],
    ) -> Response:
        current, clip = service().answering_as(form.model), await form.file.read()
        if form.stream:
            return _live(transcript_events(await current.transcribe_live(clip, form), _transcript))
        return _transcription(await current.transcribe(clip, form), form.response_format)

    add_route(app, service, serving, places or _places(serving, lambda: False, Meters()))
    return app


def _places(serving: ServingSection, going_away: Callable[[], bool], meters: Meters) -> Places:
    return Places(serving.realtime.max_sessions, serving.retry_after_seconds, meters, going_away)


def _told(connection: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if connection.scope["type"] == "websocket":
        # `Guard` knows how a session is refused; the framework would leave it without an answer.
        raise error
    response = error.response()
    if visits.current().trial:
        # The bundle that serves may have room.
        del response.headers[FULL_HEADER]
    return response


def _model(served: Served, name: str) -> wire.Model:
    return wire.Model(id=name, created=served.created)


def _choice(answer: ChatAnswer) -> wire.Choice:
    text = answer.reply.text or ""
    if answer.audio is None:
        message = wire.ReplyMessage(content=text)
    else:
        data = base64.b64encode(answer.audio.data).decode()
        audio = wire.ReplyAudio(id=answer.audio.id, data=data, expires_at=answer.audio.expires_at, transcript=text)
        message = wire.ReplyMessage(audio=audio)
    return wire.Choice(message=message, finish_reason=answer.reply.finish)


def _reading(request: wire.ChatRequest, reply: Reply) -> wire.Reading:
    unheeded = [f"messages.{place}" for place, message in enumerate(request.messages) if not message.is_said]
    return wire.Reading(question_transcript=reply.transcript, well_formed=reply.well_formed, not_followed=unheeded)


def _usage(reply: Reply) -> wire.Usage:
    prompt = reply.prompt_text_tokens + reply.prompt_audio_tokens
    completion = reply.text_tokens + reply.audio_tokens
    return wire.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=wire.PromptTokens(
            text_tokens=reply.prompt_text_tokens, audio_tokens=reply.prompt_audio_tokens
        ),
        completion_tokens_details=wire.CompletionTokens(text_tokens=reply.text_tokens, audio_tokens=reply.audio_tokens),
    )


def _speech_usage(reply: Reply) -> dict[str, int]:
    tokens_in, tokens_out = reply.prompt_text_tokens, reply.audio_tokens
    return {"input_tokens": tokens_in, "output_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}


def _transcript(reply: Reply) -> wire.Transcript:
    details = wire.InputTokenDetails(audio_tokens=reply.prompt_audio_tokens, text_tokens=reply.prompt_text_tokens)
    tokens_in = reply.prompt_audio_tokens + reply.prompt_text_tokens
    usage = wire.TranscriptUsage(
        input_tokens=tokens_in,
        output_tokens=reply.text_tokens,
        total_tokens=tokens_in + reply.text_tokens,
        input_token_details=details,
    )
    return wire.Transcript(text=reply.text or "", usage=usage)


def _transcription(written: WrittenSpeech, format: wire.TranscriptFormat) -> Response:
    text, headers = written.reply.text or "", _finish(written.reply)
    match format:
        case "json":
            return JSONResponse(_transcript(written.reply).model_dump(), headers=headers)
        case "text":
            return PlainTextResponse(f"{text}\n", headers=headers)
        case "srt":
            return PlainTextResponse(srt(text, written.seconds), media_type="application/x-subrip", headers=headers)
        case "vtt":
            return PlainTextResponse(vtt(text, written.seconds), media_type="text/vtt", headers=headers)
        case "verbose_json":
            usage = wire.DurationUsage(seconds=round(written.seconds, 3))
            body = wire.VerboseTranscript(language=LANGUAGE, duration=usage.seconds, text=text, usage=usage)
            return JSONResponse(body.model_dump(), headers=headers)


def _finish(reply: Reply) -> dict[str, str]:
    """OpenAI's transcripts and speech have no field for it: `length` where what was asked for is longer."""
    return {FINISH_HEADER: reply.finish}


_UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""A proxy in front of the gateway must not hold events back."""


def _live(events: AsyncGenerator[str, None]) -> StreamingResponse:
    return _stream(told_of_faults(events, visits.current().stream_until))


def _stream(events: Iterator[str] | AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers=_UNBUFFERED)
