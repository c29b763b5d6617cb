"""An evaluation as the terminal shows it: every figure with its 95 % interval."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_HEADLINES = {
    "recognition_wer": "recognition WER",
    "answer_accuracy": "answers right",
    "resynthesis_wer": "resynthesis WER (a recogniser's)",
    "original_wer": "its WER on the originals",
    "spoken_answer_wer": "spoken answer against its own text (WER)",
    "format_validity": "replies well-formed",
}
_OTHERS = {"stranger": "voices never heard", "recording": "real recordings"}
_ALOUD = {
    "model_wer": "spoken answer against its own text",
    "voice_wer": "the answer voice itself saying it",
    "model_dnsmos": "predicted quality of spoken answers (DNSMOS, 1 to 5)",
    "voice_dnsmos": "that of the answer voice (DNSMOS)",
    "model_distillmos": "predicted quality of spoken answers (DistillMOS, 1 to 5)",
    "voice_distillmos": "that of the answer voice (DistillMOS)",
}


def measurements(detail: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """{name: score}: the headlines (voices that training heard), everybody else, and what was judged apart."""
    shown = {_HEADLINES.get(name, name): score for name, score in detail["intervals"].items()}
    shown["“I do not know” to what lies outside"] = detail["outside_accuracy"]
    if detail.get("inside_refusals"):
        shown["“I do not know” to what lies inside"] = detail["inside_refusals"]
    for group, name in _OTHERS.items():
        if scores := detail["groups"].get(group):
            shown[f"recognition WER, {name}"] = scores["recognition_wer"]
            if scores["answer_accuracy"]:
                shown[f"answers right, {name}"] = scores["answer_accuracy"]
    for name, scores in detail.get("resynthesis", {}).items():
        shown[f"resynthesis WER, {name}"] = scores["resynthesis_wer"]
        shown[f"its WER on the originals, {name}"] = scores["original_wer"]
    shown |= {_ALOUD[name]: score for name, score in detail.get("answers_aloud", {}).items()}
    if edits := detail.get("unit_edits_in_noise"):
        shown["edits for each unit of a real recording in noise at 20 dB"] = edits
    if alone := detail.get("alone"):
        shown[f"median first audio in seconds, {alone['cores']} cores"] = alone["first_audio"]
        shown[f"median real-time factor, {alone['cores']} cores"] = alone["real_time_factor"]
    return shown


def tables(detail: Mapping[str, Any]) -> "list[Table]":
    """The measurements, and answers by category, the best first."""
    from rich.table import Table

    metrics = Table("metric", "value", "95 % interval", title="held-out questions")
    for name, score in measurements(detail).items():
        metrics.add_row(name, *written(score))
    categories = Table("category", "answers right", "95 % interval")
    scores = {name: score for name, score in detail["categories"].items() if score}
    for name, score in sorted(scores.items(), key=lambda item: -item[1]["value"]):
        categories.add_row(name, *written(score))
    return [metrics, categories] if scores else [metrics]


def written(score: Mapping[str, Any] | None) -> tuple[str, str]:
    """A score's value, and its interval with the number of utterances."""
    if score is None:
        return "not measured", ""
    return f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}, n = {score['count']}"
