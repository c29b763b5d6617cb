"""Replies that come and go in a shared batch are what each would have been alone, and as `generate` makes them."""

import random
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from speechgpt.language import batching, step_graph
from speechgpt.language.answers import parse
from speechgpt.language.batching import ContinuousBatch
from speechgpt.language.config import GenerationSection
from speechgpt.language.model import SpeechLanguageModel
from speechgpt.language.prompts import META, PromptFormat, Turn, kind_of
from speechgpt.language.unfolding import Unfolding, Units, Words

GREEDY = GenerationSection(temperature=0, max_new_tokens=24, max_text_tokens=10)
SAMPLED = GenerationSection(temperature=1.0, top_k=40, top_p=0.9, max_new_tokens=24, max_text_tokens=12)
QUESTIONS = [
    ([Turn("user", units=[1, 2, 3])], "chain"),
    ([Turn("user", text="what is two plus three")], "chain"),
    ([Turn("user", units=[30, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])], "direct"),
    ([Turn("user", text="hi"), Turn("assistant", text="hello"), Turn("user", units=[5])], "text"),
    ([Turn("user", text="<sosp><1><eosp> [ta] <eoa>")], "text"),
]


@pytest.fixture(scope="module", params=[("paper", "whole"), ("released", "released")], ids="-".join)
def model(request, untrained):
    return untrained(*request.param)


def asked(model, dialogue, form):
    segments = model.prompts.dialogue(dialogue, form)
    return segments, model.vocabulary.encode_prompt(segments), kind_of(dialogue[-1], form)


def run(batch, arrivals, drops=()):
    """arrivals: for each step the requests that come before it. Tokens of each, in the order of arrival."""
    said: dict[int, list[int]] = {}
    step = 0
    while step < len(arrivals) or batch.active or batch.waiting:
        for request in arrivals[step] if step < len(arrivals) else ():
            said[batch.add(*request)] = []
        for ticket in [ticket for when, ticket in drops if when == step]:
            batch.drop(ticket)
        for ticket, token, _ in batch.step():
            said[ticket].append(token)
        step += 1
    return list(said.values())


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prefix", ["", META], ids=["bare", "instruction"])
def test_in_a_crowd_as_alone_and_as_generate(model, generation, prefix):
    model.prompts = PromptFormat(model.prompts.dialect, prefix)
    requests, expected = [], []
    for dialogue, form in QUESTIONS:
        segments, ids, kind = asked(model, dialogue, form)
        requests.append((ids, kind, generation, 5))
        expected.append(model.reply([segments], kind, generation, seed=5)[0])
    draw = random.Random(0)
    order = draw.sample(range(5), 5)
    arrivals = [[requests[order[0]], requests[order[1]]], [], [requests[order[2]]], *[[]] * 5, [requests[order[3]]], []]
    arrivals.append([requests[order[4]]])
    crowd = run(ContinuousBatch(model, 3), arrivals)
    kinds = [request[1] for request in requests]
    assert [parse(said, model.vocabulary, kinds[i]) for said, i in zip(crowd, order, strict=True)] == [
        expected[i] for i in order
    ]
    batch = ContinuousBatch(model, 3)
    assert [run(batch, [[requests[i]]])[0] for i in order] == crowd


def test_who_leaves_changes_nobody_else(model):
    requests = [(*asked(model, dialogue, form)[1:], GREEDY, 0) for dialogue, form in QUESTIONS]
    whole = run(ContinuousBatch(model, 5), [requests])
    batch = ContinuousBatch(model, 5)
    some = run(batch, [requests], drops=[(0, 5), (7, 1), (7, 99), (8, 3)])
    assert [some[1], some[3]] == [whole[1], whole[3]]
    assert not some[4] and len(some[0]) < len(whole[0]) and some[0] == whole[0][: len(some[0])]
    assert (batch.active, batch.waiting) == (0, 0)


def test_nothing_is_kept_for_the_longest_reply_there_ever_was(model):
    ids, kind = asked(model, *QUESTIONS[0])[1:]
    batch = ContinuousBatch(model, 2)
    first = run(batch, [[(ids, kind, GREEDY, 0)]])
    assert sum(layer.keys.numel() + layer.values.numel() for layer in batch._cache.layers) == 0
    assert run(batch, [[(ids, kind, GREEDY, 0)]]) == first


def test_a_prompt_that_fills_the_context_is_refused(model):
    with pytest.raises(ValueError, match="1024"):
        ContinuousBatch(model, 1).add([5] * 1024, "text", GREEDY, 0)


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_unfolds_is_the_answer(model, generation):
    draw = random.Random(1)
    for dialogue, form in QUESTIONS:
        _, ids, kind = asked(model, dialogue, form)
        [said] = run(ContinuousBatch(model, 1), [[(ids, kind, generation, 3)]])
        unfolding, told = Unfolding(model.vocabulary, kind), []
        place = 0
        while place < len(said):
            count = draw.randint(1, 3)
            told += unfolding.push(said[place : place + count])
            place += count
        rest, answer = unfolding.finish()
        told += rest
        assert answer == parse(said, model.vocabulary, kind)
        for field in ("transcript", "text"):
            words = "".join(piece.text for piece in told if isinstance(piece, Words) and piece.field == field)
            assert words == (getattr(answer, field) or "")
        units = [unit for piece in told if isinstance(piece, Units) for unit in piece.units]
        assert units == (answer.units or [])


@pytest.fixture
def adapters(model, tmp_path):
    """Three, whose weights are drawn: each changes every reply."""
    for seed, name in enumerate(("default", "pirate", "polite")):
        torch.manual_seed(seed)
        settings = LoraConfig(
            r=2 + seed, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
        )
        get_peft_model(deepcopy(model.model), settings).save_pretrained(str(tmp_path / name))
    return {name: tmp_path / name for name in ("default", "pirate", "polite")}


def adapted(model, adapter):
    """The model with one adapter loaded, or none, as a bundle's own is."""
    base = deepcopy(model.model)
    loaded = PeftModel.from_pretrained(base, str(adapter)) if adapter else base
    return SpeechLanguageModel(loaded, model.vocabulary, model.prompts)


@pytest.mark.parametrize("own", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("prefix", ["", META], ids=["no prefix", "instruction"])
def test_adapters_share_a_batch_and_each_answers_as_alone(model, adapters, own, prefix, monkeypatch):
    monkeypatch.setattr(batching, "_SMALL", 0)
    model.prompts = PromptFormat(model.prompts.dialect, prefix)
    default = adapters.pop("default")
    own_adapter = default if own else None
    alone = {"": own_adapter, **adapters}
    dialogue, form = QUESTIONS[1]
    segments, ids, kind = asked(model, dialogue, form)
    expected = {name: adapted(model, path).reply([segments], kind, SAMPLED, seed=5)[0] for name, path in alone.items()}
    assert len({str(answer) for answer in expected.values()}) == 3
    names = ["pirate", "", "polite", "pirate", ""]
    arrivals = [[(ids, kind, SAMPLED, 5, name) for name in names[:3]], [], [(ids, kind, SAMPLED, 5, "pirate")]]
    arrivals += [[(ids, kind, SAMPLED, 5)]]
    for quick in (False, True):
        said = run(ContinuousBatch(adapted(model, own_adapter), 4, adapters, quick=quick), arrivals)
        assert [parse(tokens, model.vocabulary, kind) for tokens in said] == [expected[name] for name in names]


def test_an_adapter_that_is_not_here_or_cannot_be_mixed_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="no adapter 'pirate'"):
        ContinuousBatch(model, 2).add([1, 2], "chain", GREEDY, 0, "pirate")
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(deepcopy(model.model), settings).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="adapter head.*modules_to_save"):
        ContinuousBatch(adapted(model, None), 2, {"head": tmp_path})


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_replies_are_the_same_with_a_graph_of_the_step(model, generation, monkeypatch):
    requests = [(ids, kind, generation, 5) for _, ids, kind in (asked(model, *question) for question in QUESTIONS)]
    arrivals = [requests[:2], [], requests[2:4], [], [], requests[4:]]
    expected = run(ContinuousBatch(model, 3), arrivals)
    passes = []
    forward = ContinuousBatch._forward
    monkeypatch.setattr(ContinuousBatch, "_forward", lambda *given: passes.append(given[1].shape) or forward(*given))
    assert run(ContinuousBatch(model, 3, quick=True), arrivals) == expected
    # The model itself reads the prompts, and no more: also the instruction with which they begin.
    assert len(passes) <= len(requests) + 1 < sum(map(len, expected))


@pytest.mark.parametrize("generation", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("adapter", [None, "default"])
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "large"])
def test_replies_of_a_larger_model_are_the_same_with_its_weights_packed(
    model, adapters, adapter, generation, traced, monkeypatch
):
    monkeypatch.setattr(batching, "_SMALL", 0)
    monkeypatch.setattr(step_graph, "LARGEST", step_graph.LARGEST if traced else 0)
    requests = [(ids, kind, generation, 5) for _, ids, kind in (asked(model, *question) for question in QUESTIONS)]
    arrivals = [requests[:2], [], requests[2:4], [], [], requests[4:]]
    plain, packed = (adapted(model, adapter and adapters[adapter]) for _ in range(2))
    expected = run(ContinuousBatch(plain, 3), arrivals)
    quick = ContinuousBatch(packed, 3, quick=True)
    assert run(quick, arrivals) == expected
    assert (quick._graph is not None) == traced
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.model.modules())
