"""`bench vocoder`: units to speech, the published CodeHiFiGAN with predicted durations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechgpt.interop.benches.baseline import BenchError, Fairseq
from speechgpt.interop.benches.encode import machine
from speechgpt.interop.benches.timing import Taken, operations, peak, profile

if TYPE_CHECKING:
    from speechgpt.speech.vocoder import UnitVocoder, Vocoder

UNITS = 1000
ROUND = 10
ANSWER_SECONDS, PUSH = 10, 10
"""Of the streamed answer, and the units that come at a time."""
CONFIG: dict[str, Any] = {
    "resblock": "1",
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 512,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "num_embeddings": UNITS,
    "embedding_dim": 128,
    "model_in_dim": 128,
    "code_hop_size": 320,
    "sampling_rate": 16000,
    "f0": False,
    "dur_predictor_params": {
        "encoder_embed_dim": 128,
        "var_pred_hidden_dim": 128,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
}
"""SPEC 4.1."""


def run(count: int, threads: int, seed: int, folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """The result as `bench` prints it. folder: an empty directory for what both sides read."""
    import copy

    import torch

    from speechgpt.speech.packed_products import multiplies_bfloat16
    from speechgpt.speech.vocoder import Precision, Vocoder, fold_weight_norm

    torch.set_num_threads(threads)
    model = audible(seed)
    torch.save({"generator": published_state(model)}, folder / "g_00000001")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    precisions: tuple[Precision, ...] = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
    vocoders = {name: Vocoder(copy.deepcopy(model), name) for name in precisions}
    clips = mixed_units(count, seed)
    theirs, lean, ours = Taken(), Taken(), {name: Taken() for name in vocoders}
    samples, difference = 0, dict.fromkeys(vocoders, 0.0)
    settings = {"checkpoint": str(folder / "g_00000001"), "config": str(folder / "config.json")}
    with Fairseq(threads, model="vocoder", **settings) as fairseq:

        def fairseq_speaks(units: list[int], taken: Taken, lean: bool) -> np.ndarray:
            answer = fairseq.ask(units=units, lean=lean, sound=str(folder / "sound.npy"))
            taken.add(answer["wall"], answer["processor"])
            return np.load(folder / "sound.npy")

        for made in vocoders.values():
            made.synthesize(clips[:1])
        fairseq_speaks(clips[0], Taken(), False)
        for start in range(0, count, ROUND):
            batch = clips[start : start + ROUND]
            wanted = [fairseq_speaks(units, theirs, False) for units in batch]
            for units in batch:
                fairseq_speaks(units, lean, True)
            for name, made in vocoders.items():
                sounds = ours[name].measure(lambda made=made, batch=batch: made.synthesize(batch))  # type: ignore[misc]
                for sound, theirs_of_it in zip(sounds, wanted, strict=True):
                    if len(sound) != len(theirs_of_it):
                        raise BenchError(f"a clip of {len(theirs_of_it)} samples there has {len(sound)} here")
                    difference[name] = max(difference[name], float(np.abs(sound - theirs_of_it).max()))
            samples += sum(map(len, wanted))
            advance(len(batch))
    if difference["float32"] > 1e-4:
        raise BenchError(f"the sounds differ by {difference['float32']:.2g}, so their speeds do not compare")
    seconds = samples / 16_000
    fold_weight_norm(model)
    frames = torch.randn(1, 128, 250)
    with torch.inference_mode():
        work = operations(lambda: model.generator(frames)) / 5
    return {
        "figure": round(seconds / ours["float32"].processor, 2),
        "unit": "seconds of speech per processor-second, float32",
        "baseline": round(seconds / theirs.processor, 2),
        "ratio": round(theirs.processor / ours["float32"].processor, 2),
        "conditions": {
            **machine(threads),
            "clips": count,
            "seconds": round(seconds, 1),
            "model": "CodeHiFiGAN as published, random weights, durations predicted",
            "baseline": "fairseq 0.12.2 as its generate_waveform_from_code.py: one clip at a time, gradients recorded",
            "clock": f"processor time, both sides in turn, {ROUND} clips each",
            "wall_ratio": round(theirs.wall / ours["float32"].wall, 2),
            "ratio_to_fairseq_without_gradients": round(lean.processor / ours["float32"].processor, 2),
            "largest_difference": difference["float32"],
            # Those that this processor has.
            **{
                name: {
                    "figure": round(seconds / taken.processor, 2),
                    "ratio": round(theirs.processor / taken.processor, 2),
                    "ratio_to_fairseq_without_gradients": round(lean.processor / taken.processor, 2),
                    "wall_ratio": round(theirs.wall / taken.wall, 2),
                    "largest_difference": difference[name],
                }
                for name, taken in ours.items()
                if name != "float32"
            },
            "streaming": {name: streaming(made, seed) for name, made in vocoders.items()},
            "floor": {
                "operations_a_second_of_speech": work,
                **{
                    name: {
                        "seconds": round(work / peak(getattr(torch, name)), 4),
                        "taken": round(ours[name].processor / seconds, 4),
                        "fairseq": round(theirs.processor / seconds, 4),
                    }
                    for name in vocoders
                },
            },
            "profile": {
                name: profile(lambda made=made: made.synthesize(clips[:1]))  # type: ignore[misc]
                for name, made in vocoders.items()
            },
        },
    }


def streaming(vocoder: "Vocoder", seed: int) -> dict[str, float]:
    """The first sound of an answer, against the whole in one piece, in processor-seconds."""
    from speechgpt.speech.streaming import VocoderStream

    units = np.random.default_rng(seed).integers(UNITS, size=ANSWER_SECONDS * 50).tolist()
    # Each unit lasts a frame at least, so there are more than enough.
    ends = np.cumsum(vocoder.durations([units])[0])
    units = units[: int(np.searchsorted(ends, ANSWER_SECONDS * 50)) + 1]
    frames = int(vocoder.durations([units])[0].sum())
    whole = Taken()
    vocoder.synthesize([units])
    whole.measure(lambda: vocoder.synthesize([units]))
    first, all_of_it = Taken(), Taken()
    stream, sounds = VocoderStream(vocoder), []
    for start in range(0, len(units), PUSH):
        taken = all_of_it.measure(lambda start=start: stream.push(units[start : start + PUSH]))  # type: ignore[misc]
        sounds.append(taken)
        if not first.processor and len(taken):
            first = Taken(all_of_it.wall, all_of_it.processor)
    sounds.append(all_of_it.measure(stream.finish))
    return {
        "seconds_of_answer": frames / 50,
        "whole": round(whole.processor, 4),
        "first_sound": round(first.processor, 4),
        "first_sound_share": round(first.processor / whole.processor, 4),
        "streamed_in_all": round(all_of_it.processor, 4),
    }


def audible(seed: int) -> "UnitVocoder":
    """Random weights of such length that a signal neither dies on its way through the layers nor drowns in tanh."""
    import torch

    from speechgpt.speech.config import GeneratorSection
    from speechgpt.speech.vocoder import UnitVocoder

    torch.manual_seed(seed)
    model = UnitVocoder(GeneratorSection(), UNITS)
    with torch.no_grad():
        for name, parameter in model.generator.named_parameters():
            if name.endswith("weight.original0"):
                parameter.copy_((0.2 if "conv_post" in name else 0.9) * (1 + 0.2 * torch.randn(parameter.shape)))
        predictor = model.dur_predictor
        if predictor is not None:
            predictor.proj.bias.fill_(1.2)
    return model.eval()


def published_state(model: "UnitVocoder") -> dict[str, Any]:
    """Its tensors under the names that fairseq gives them."""
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("generator.")
        for ours, published in names.items():
            name = name.replace(ours, published)
        state[name] = tensor
    return state


def mixed_units(count: int, seed: int) -> list[list[int]]:
    """Merged units of each clip: 30 to 330, about 1 to 12 s, evenly in the logarithm."""
    draw = np.random.default_rng(seed)
    lengths = np.exp(draw.uniform(np.log(30), np.log(330), count)).astype(int)
    return [draw.integers(UNITS, size=length).tolist() for length in lengths]
