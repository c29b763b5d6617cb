"""Questions put to models in Ray actors; for `evaluate-instructions` what has come back is kept as it comes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from speechgpt.runtime.progress import Counter, Progress
from speechgpt.runtime.workspace import Workspace

if TYPE_CHECKING:
    from speechgpt.evaluation.examination import Clip
    from speechgpt.evaluation.instruction_following import Asking
    from speechgpt.evaluation.judge import Item, Judge, Verdict
    from speechgpt.language.answers import Answer

    Call = Callable[[Sequence[Clip]], Any]
    """Asks an actor about a chunk of clips; gives the reference of the replies, one a clip, in order."""

_CHUNK = 32
"""Questions in one call of an actor, and answers in one of the judge: the step of the progress bar."""
_CPUS = 0.5
"""Two of these actors work at a time, and must find room on a cluster of one CPU."""


class Parts:
    """JSON values of a workspace's directory, by name: what a killed attempt had got is there for the next one."""

    def __init__(self, workspace: Workspace, directory: str) -> None:
        self._workspace, self._directory = workspace, directory

    def get(self, name: str) -> Any | None:
        file = f"{self._directory}/{name}.json"
        return self._workspace.read_json(file) if self._workspace.exists(file) else None

    def put(self, name: str, value: Any) -> None:
        self._workspace.write_json(f"{self._directory}/{name}.json", value)


class Answered(NamedTuple):
    """What an asking got: the clips that were asked, their answers, and what a recogniser heard of the spoken ones
    (None without one), by clip id."""

    clips: "Sequence[Clip]"
    answers: "Mapping[str, Answer]"
    heard: Mapping[str, str] | None


@contextmanager
def actor(kind: Any, *arguments: Any, cpus: float = _CPUS) -> Iterator[Any]:
    """An actor of this class while the block runs."""
    import ray

    made = ray.remote(num_cpus=cpus)(kind).remote(*arguments)
    try:
        yield made
    finally:
        ray.kill(made)


class Interviews:
    """Every asking of a run. A recogniser listens to one's answers while the next one is asked.

    listener: a `BundleListener` actor; None if nobody is to listen.
    """

    def __init__(self, clips: "Sequence[Clip]", parts: Parts, listener: Any | None) -> None:
        self._clips, self._parts, self._listener = clips, parts, listener
        self._answers: dict[Asking, dict[str, Answer]] = {}
        self._listening: dict[Asking, Any] = {}

    def hold(self, asking: "Asking", call: "Call", counter: Counter) -> None:
        """Ask every clip that can be asked so."""
        from speechgpt.evaluation.instruction_following import askable
        from speechgpt.language.answers import Answer

        clips = askable(self._clips, asking)
        replies = kept_in_chunks(call, clips, counter, self._parts, asking.name)
        answers = self._answers[asking] = {name: Answer(*reply) for name, reply in replies.items()}
        if asking.spoken and self._listener and self._parts.get(_heard(asking)) is None:
            units = {name: list(answer.units) for name, answer in answers.items() if answer.units}
            self._listening[asking] = self._listener.spoken.remote(units)

    def results(self, progress: Progress) -> "dict[Asking, Answered]":
        """All that was asked, when the recogniser has heard it out."""
        import ray

        with progress.count("listening to the answers", len(self._listening), "sets") as counter:
            for asking, pending in self._listening.items():
                self._parts.put(_heard(asking), ray.get(pending).words)
                counter.advance()
        self._listening.clear()
        found = {}
        for asking, answers in self._answers.items():
            clips = [clip for clip in self._clips if clip.id in answers]
            heard = self._parts.get(_heard(asking)) if asking.spoken and self._listener else None
            found[asking] = Answered(clips, answers, heard)
        return found


def in_chunks(call: "Call", clips: "Sequence[Clip]", counter: Counter) -> dict[str, Any]:
    """{clip id: reply} of an actor's method, asked in chunks of clips of like length."""
    import ray

    ordered = sorted(clips, key=lambda clip: (len(clip.units), clip.id))
    chunks = [ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK)]
    replies: dict[str, Any] = {}
    for chunk, pending in [(chunk, call(chunk)) for chunk in chunks]:
        replies |= zip((clip.id for clip in chunk), ray.get(pending), strict=True)
        counter.advance(len(chunk))
    return replies


def kept_in_chunks(call: "Call", clips: "Sequence[Clip]", counter: Counter, parts: Parts, name: str) -> dict[str, Any]:
    """As `in_chunks`, unless the part is there."""
    replies: dict[str, Any] | None = parts.get(name)
    if replies is None:
        replies = in_chunks(call, clips, counter)
        parts.put(name, replies)
    else:
        counter.advance(len(clips))
    return replies


def verdicts(items: "Sequence[Item]", judge: "Judge", parts: Parts, progress: Progress) -> "dict[Item, Verdict]":
    """The judge's verdict on each item; what it was asked before, for whomever, it is not asked again."""
    from speechgpt.evaluation.judge import Item, Verdict

    known = {Item(*item): Verdict(*verdict) for item, verdict in parts.get("verdicts") or ()}
    missing = [item for item in dict.fromkeys(map(judge.seen, items)) if item not in known]
    with progress.count(f"judging by {judge.name}", len(known) + len(missing), "answers", len(known)) as counter:
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            known |= zip(chunk, judge.score(chunk), strict=True)
            parts.put("verdicts", list(known.items()))
            counter.advance(len(chunk))
    return {item: known[judge.seen(item)] for item in items}


def _heard(asking: "Asking") -> str:
    return f"{asking.name}.heard"
