import pytest

from speechgpt.evaluation.conversation import Timing
from speechgpt.evaluation.examination import Clip, UnitLoss
from speechgpt.evaluation.metrics import Bootstrap
from speechgpt.evaluation.scoring import (
    Examined,
    Heard,
    beside_the_voice,
    figures,
    headline,
    mean,
    resynthesis,
    stage_figures,
    waiting,
)
from speechgpt.language.answers import Answer

CONTRACT = {
    "recognition_wer",
    "answer_accuracy",
    "resynthesis_wer",
    "original_wer",
    "spoken_answer_wer",
    "format_validity",
    "utterances",
}
PLAIN = Bootstrap(samples=0)


def clip(
    name: str,
    group: str = "seen",
    text: str | None = "two plus two",
    answer: str | None = "four",
    category: str = "plus",
):
    return Clip(name, group, "ann", text, answer, category, (1, 2))


def said(text: str | None, well_formed: bool = True) -> Answer:
    return Answer("two plus two", text, [3, 4], well_formed, "stop" if well_formed else "length")


def test_the_keys_are_the_contract_s_and_unmeasured_ones_are_null():
    measured = figures([clip("a")], Examined(), Heard(), PLAIN)
    assert set(measured) == CONTRACT | {"detail"}
    assert measured["utterances"] == 1
    assert all(measured[key] is None for key in CONTRACT - {"utterances"})


def test_headline_figures_are_of_seen_voices_and_the_others_stand_beside_them():
    clips = [clip("a"), clip("b", "stranger")]
    examined = Examined(transcripts={"a": "two plus two", "b": "two"}, replies={"a": said("four"), "b": said("five")})
    measured = figures(clips, examined, Heard(), PLAIN)
    assert (measured["recognition_wer"], measured["answer_accuracy"]) == (0.0, 1.0)
    stranger = measured["detail"]["groups"]["stranger"]
    assert stranger["recognition_wer"]["value"] == 2 / 3
    assert stranger["answer_accuracy"]["value"] == 0.0


def test_a_manifest_of_its_own_is_the_headline():
    clips = [clip("a", "manifest"), clip("b", "manifest")]
    assert headline(clips) == clips


def test_spoken_answers_are_held_against_the_model_s_own_words_and_against_the_right_ones():
    examined = Examined(replies={"a": said("five")})
    measured = figures([clip("a")], examined, Heard(answers={"a": "5"}), PLAIN)
    assert measured["spoken_answer_wer"] == 0.0
    assert measured["detail"]["spoken_answer_wer_against_gold"]["value"] == 1.0


def test_clips_without_text_or_answer_are_left_out_of_what_needs_them():
    clips = [clip("a", text=None, answer=None), clip("b")]
    examined = Examined(transcripts={"a": "anything", "b": "two plus two"}, replies={"a": said("x"), "b": said("four")})
    measured = figures(clips, examined, Heard(original={"a": "x", "b": "two plus two"}), PLAIN)
    assert (measured["recognition_wer"], measured["answer_accuracy"], measured["original_wer"]) == (0.0, 1.0, 0.0)
    assert measured["detail"]["intervals"]["recognition_wer"]["count"] == 1


def test_questions_outside_the_world_are_counted_by_themselves():
    clips = [clip("a"), clip("b", category="outside", answer="i do not know")]
    examined = Examined(replies={"a": said("four"), "b": said("four")})
    detail = figures(clips, examined, Heard(), PLAIN)["detail"]
    assert detail["outside_accuracy"]["value"] == 0.0
    assert detail["categories"]["plus"]["value"] == 1.0


def test_replies_that_were_cut_are_counted_and_malformed():
    examined = Examined(replies={"a": said("four"), "b": said(None, well_formed=False)})
    measured = figures([clip("a"), clip("b")], examined, Heard(), PLAIN)
    assert measured["format_validity"] == 0.5
    assert measured["detail"]["cut_replies"] == 1
    assert measured["answer_accuracy"] == 0.5, "no answer is a wrong answer"


def test_a_stage_is_measured_on_what_it_was_asked():
    examined = Examined(
        transcripts={"a": "two plus two", "c": "two"},
        typed={"a": "four", "b": "five"},
        losses={"a": UnitLoss(0.0, 2)},
    )
    row = stage_figures([clip("a"), clip("b"), clip("c", "stranger")], examined, PLAIN)
    assert row["recognition_wer_strangers"]["value"] == 2 / 3
    assert row["recognition_wer"]["value"] == 0.0
    assert row["typed_answer_accuracy"]["value"] == 0.5
    assert row["unit_perplexity"]["value"] == 1.0
    assert row["answer_accuracy"] is None


def test_not_knowing_what_it_could_know_is_counted():
    clips = [clip("a"), clip("b"), clip("c", answer="i do not know", category="outside")]
    replies = {"a": said("four"), "b": said("i do not know"), "c": said("i do not know")}
    measured = figures(clips, Examined(replies=replies), Heard(), PLAIN)["detail"]
    assert measured["inside_refusals"]["value"] == 0.5
    assert measured["outside_accuracy"]["value"] == 1.0


def test_the_headline_s_resynthesis_is_of_the_judged_clips_alone():
    clips = [clip("a"), clip("b", "stranger")]
    heard = Heard(original={"a": "two plus two", "b": "two plus two"}, resynthesised={"a": "two plus two", "b": "two"})
    assert figures(clips, Examined(), heard, PLAIN, judged=clips[:1])["resynthesis_wer"] == 0.0
    apart = resynthesis(clips[1:], heard, PLAIN)
    assert (apart["original_wer"]["value"], apart["resynthesis_wer"]["value"]) == (0.0, 2 / 3)


def test_answers_stand_beside_the_voice_that_says_the_same():
    examined = Examined(replies={"a": said("it is four"), "b": said("it is five")})
    heard = Heard(answers={"a": "it is for", "b": "it is five"}, said={"a": "it is four"})
    opinions = {"model": {"dnsmos": {"a": 3.0, "b": 4.0}}, "voice": {"dnsmos": {"a": 4.5}}}
    beside = beside_the_voice(examined, heard, opinions, PLAIN)
    assert beside["model_wer"]["value"] == 1 / 3 and beside["voice_wer"]["value"] == 0.0
    assert beside["model_dnsmos"]["value"] == 3.5 and beside["voice_dnsmos"]["value"] == 4.5


def test_waits_are_medians_and_set_against_the_length_of_the_answer():
    measured = waiting([Timing(1.0, 2.0), Timing(3.0, 2.0), Timing(8.0, 1.0)], PLAIN)
    assert measured["first_audio"]["value"] == 3.0
    assert measured["real_time_factor"]["value"] == 1.5
    assert waiting([], PLAIN) == {"first_audio": None, "real_time_factor": None}


def test_a_mean_is_over_the_clips():
    assert (mean({"a": 0.1, "b": 0.3}, PLAIN) or {})["value"] == pytest.approx(0.2)
    assert mean({}, PLAIN) is None
