"""From what a model said and what was heard, to figures. Pure: nothing here runs a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from speechgpt.evaluation.conversation import Timing
from speechgpt.evaluation.examination import Clip, UnitLoss
from speechgpt.evaluation.metrics import (
    Bootstrap,
    Score,
    exact_matches,
    median,
    perplexity,
    ratio,
    share,
    word_error_rate,
)
from speechgpt.language.answers import Answer
from speechgpt.language.world import OUTSIDE


@dataclass(frozen=True)
class Heard:
    """What the independent recogniser wrote down, by clip id."""

    original: Mapping[str, str] = field(default_factory=dict)
    resynthesised: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    """The model's answers as the answer voice itself says them."""


@dataclass(frozen=True)
class Examined:
    """What one model gave back, by clip id; what it was not asked is not in there."""

    transcripts: Mapping[str, str] = field(default_factory=dict)
    replies: Mapping[str, Answer] = field(default_factory=dict)
    typed: Mapping[str, str] = field(default_factory=dict)
    losses: Mapping[str, UnitLoss] = field(default_factory=dict)


def headline(clips: Sequence[Clip]) -> list[Clip]:
    """The clips that the headline figures are of: seen voices if there are any, else all."""
    return [clip for clip in clips if clip.group == "seen"] or list(clips)


def figures(
    clips: Sequence[Clip], examined: Examined, heard: Heard, bootstrap: Bootstrap, judged: Sequence[Clip] | None = None
) -> dict[str, Any]:
    """The contract's keys (numbers, or null where nothing could be measured) and `detail` with intervals and parts.

    judged: the clips whose resynthesis the headline is of; None: all that were listened to.
    """
    main, judged = headline(clips), clips if judged is None else judged
    scores = {
        "recognition_wer": _recognition(main, examined, bootstrap),
        "answer_accuracy": _accuracy(main, examined.replies, bootstrap),
        "resynthesis_wer": _heard_wer(judged, heard.resynthesised, bootstrap),
        "original_wer": _heard_wer(judged, heard.original, bootstrap),
        "spoken_answer_wer": _spoken(clips, examined, heard, "own", bootstrap),
        "format_validity": share([reply.well_formed for reply in examined.replies.values()], bootstrap),
    }
    detail = {
        "intervals": {name: _plain(score) for name, score in scores.items()},
        "groups": {group: _group(members, examined, bootstrap) for group, members in _by(clips, "group").items()},
        "categories": {
            category: _plain(_accuracy(members, examined.replies, bootstrap))
            for category, members in _by(_asked(main, examined.replies), "category").items()
        },
        "outside_accuracy": _plain(_accuracy([c for c in main if c.category == OUTSIDE], examined.replies, bootstrap)),
        "inside_refusals": _plain(_refusals(main, examined.replies, bootstrap)),
        "unit_perplexity": _plain(_perplexity(clips, examined.losses, bootstrap)),
        "spoken_answer_wer_against_gold": _plain(_spoken(clips, examined, heard, "gold", bootstrap)),
        "cut_replies": sum(reply.finish == "length" for reply in examined.replies.values()),
    }
    return {name: score and score.value for name, score in scores.items()} | {
        "utterances": len(clips),
        "detail": detail,
    }


def stage_figures(clips: Sequence[Clip], examined: Examined, bootstrap: Bootstrap) -> dict[str, Any]:
    """One row of the table of stages: the same questions put to the model that a training stage left."""
    main, strangers = headline(clips), [clip for clip in clips if clip.group == "stranger"]
    typed = [clip for clip in clips if clip.id in examined.typed and clip.answer is not None]
    typed_right = exact_matches([clip.answer or "" for clip in typed], [examined.typed[clip.id] for clip in typed])
    return {
        "recognition_wer": _plain(_recognition(main, examined, bootstrap)),
        "recognition_wer_strangers": _plain(_recognition(strangers, examined, bootstrap)),
        "answer_accuracy": _plain(_accuracy(main, examined.replies, bootstrap)),
        "answer_accuracy_strangers": _plain(_accuracy(strangers, examined.replies, bootstrap)),
        "typed_answer_accuracy": _plain(share(typed_right, bootstrap)),
        "unit_perplexity": _plain(_perplexity(clips, examined.losses, bootstrap)),
    }


def _group(clips: Sequence[Clip], examined: Examined, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "utterances": len(clips),
        "recognition_wer": _plain(_recognition(clips, examined, bootstrap)),
        "answer_accuracy": _plain(_accuracy(clips, examined.replies, bootstrap)),
        "speakers": {
            speaker: _plain(_recognition(members, examined, bootstrap))
            for speaker, members in _by(clips, "speaker").items()
        },
    }


def _recognition(clips: Sequence[Clip], examined: Examined, bootstrap: Bootstrap) -> Score | None:
    told = [clip for clip in clips if clip.text is not None and clip.id in examined.transcripts]
    return word_error_rate([c.text or "" for c in told], [examined.transcripts[c.id] for c in told], bootstrap)


def _asked(clips: Sequence[Clip], replies: Mapping[str, Answer]) -> list[Clip]:
    return [clip for clip in clips if clip.answer is not None and clip.id in replies]


def _accuracy(clips: Sequence[Clip], replies: Mapping[str, Answer], bootstrap: Bootstrap) -> Score | None:
    asked = _asked(clips, replies)
    return share(exact_matches([c.answer or "" for c in asked], [replies[c.id].text for c in asked]), bootstrap)


def resynthesis(clips: Sequence[Clip], heard: Heard, bootstrap: Bootstrap) -> dict[str, Any]:
    """What the recogniser makes of these clips, and of the same clips through units and vocoder."""
    return {
        "original_wer": _plain(_heard_wer(clips, heard.original, bootstrap)),
        "resynthesis_wer": _plain(_heard_wer(clips, heard.resynthesised, bootstrap)),
    }


def beside_the_voice(
    examined: Examined,
    heard: Heard,
    quality: Mapping[str, Mapping[str, Mapping[str, float]]],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The same answers spoken by the model and by the answer voice itself: how well understood, and how rated.

    quality: predicted opinions of `model` and `voice`, by rater and clip id.
    """
    both = sorted(set(heard.answers) & set(heard.said))
    own = [examined.replies[name].text or "" for name in both]
    return {
        "model_wer": _plain(word_error_rate(own, [heard.answers[name] for name in both], bootstrap)),
        "voice_wer": _plain(word_error_rate(own, [heard.said[name] for name in both], bootstrap)),
    } | {
        f"{who}_{rater}": mean(rated, bootstrap)
        for who, opinions in quality.items()
        for rater, rated in opinions.items()
    }


def mean(values: Mapping[str, float], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Of figures by clip id."""
    return _plain(ratio(list(values.values()), [1.0] * len(values), bootstrap))


def waiting(timings: Sequence[Timing], bootstrap: Bootstrap) -> dict[str, Any]:
    """Medians of the wait for the first sound (s), which comes when the answer is whole, and of wait over answer."""
    return {
        "first_audio": _plain(median([each.waited for each in timings], bootstrap)),
        "real_time_factor": _plain(median([each.waited / each.answer for each in timings], bootstrap)),
    }


def _refusals(clips: Sequence[Clip], replies: Mapping[str, Answer], bootstrap: Bootstrap) -> Score | None:
    """The share of what the model could know that it says it does not."""
    refusals = {clip.answer for clip in clips if clip.category == OUTSIDE}
    inside = [clip for clip in _asked(clips, replies) if clip.category != OUTSIDE]
    return share([replies[clip.id].text in refusals for clip in inside], bootstrap) if refusals else None


def _heard_wer(clips: Sequence[Clip], heard: Mapping[str, str], bootstrap: Bootstrap) -> Score | None:
    told = [clip for clip in clips if clip.text is not None and clip.id in heard]
    return word_error_rate([clip.text or "" for clip in told], [heard[clip.id] for clip in told], bootstrap)


def _spoken(
    clips: Sequence[Clip], examined: Examined, heard: Heard, against: str, bootstrap: Bootstrap
) -> Score | None:
    """WER of what was heard of the spoken answers: against the model's `own` text answers, or the `gold` ones."""
    references, hypotheses = [], []
    for clip in clips:
        if clip.id not in heard.answers:
            continue
        wanted = examined.replies[clip.id].text if against == "own" else clip.answer
        if wanted is not None:
            references.append(wanted)
            hypotheses.append(heard.answers[clip.id])
    return word_error_rate(references, hypotheses, bootstrap)


def _perplexity(clips: Sequence[Clip], losses: Mapping[str, UnitLoss], bootstrap: Bootstrap) -> Score | None:
    known = [losses[clip.id] for clip in clips if clip.id in losses]
    return perplexity([loss.nats for loss in known], [loss.tokens for loss in known], bootstrap)


def _by(clips: Sequence[Clip], attribute: str) -> dict[str, list[Clip]]:
    parts: dict[str, list[Clip]] = {}
    for clip in clips:
        parts.setdefault(getattr(clip, attribute), []).append(clip)
    return dict(sorted(parts.items()))


def _plain(score: Score | None) -> dict[str, Any] | None:
    return None if score is None else score.figures()
