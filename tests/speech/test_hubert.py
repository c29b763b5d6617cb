from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import HUBERT, HUBERT_LAYOUTS
from transformers import HubertModel

from speechgpt.speech import hubert, long_audio, split_products
from speechgpt.speech.codebook import Codebook
from speechgpt.speech.encoder import SpeechEncoder, batches_by_length


def model(layout: str, **changed: int) -> HubertModel:
    made = hubert.scratch({**HUBERT, **HUBERT_LAYOUTS[layout], **changed}, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # random initialisation alone is too small to tell much
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made.eval()


def clips() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(size=n).astype(np.float32) for n in (16_000, 9_000, 400, 31_234, 9_001)]


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
@pytest.mark.parametrize("layer", [1, 2, -1])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_clip_alone_equals_transformers(layout: str, layer: int, frozen: bool) -> None:
    plain = model(layout)
    ours = hubert.HubertFeatures(model(layout), layer, normalize=False)
    if frozen:
        ours.freeze()
    for wave in clips():
        captured: list[torch.Tensor] = []
        handle = plain.encoder.layers[layer if layer < 0 else layer - 1].register_forward_hook(
            lambda _m, _i, out, kept=captured: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.inference_mode():
            plain(torch.from_numpy(wave)[None])
        handle.remove()
        torch.testing.assert_close(ours([wave])[0], captured[0][0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_padded_batch_equals_the_clips_alone(layout: str, normalize: bool, frozen: bool) -> None:
    features = hubert.HubertFeatures(model(layout), -1, normalize)
    if frozen:
        features.freeze()
    for together, wave in zip(features(clips()), clips(), strict=True):
        alone = features([wave])[0]
        assert together.shape == alone.shape == (hubert.frame_count(len(wave)), 32)
        torch.testing.assert_close(together, alone, atol=5e-5, rtol=1e-4)


def test_float32_is_not_rounded_on_its_way_through_cudnn() -> None:
    features = hubert.HubertFeatures(model("base"), 2, normalize=False)
    convolution = features.first_convolution
    assert convolution is not None and torch.backends.cudnn.allow_tf32
    rounded = []
    convolution.register_forward_hook(lambda *_: rounded.append(torch.backends.cudnn.allow_tf32))
    features(clips())
    long_audio.gather(features, clips()[0], with_channels=True)
    assert rounded == [False, False] and torch.backends.cudnn.allow_tf32


def test_units_do_not_depend_on_the_batch() -> None:
    features = hubert.HubertFeatures(model("base"), 2, normalize=True)
    sample = torch.cat(features(clips()))
    codebook = Codebook(sample[torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:40]])
    encoder = SpeechEncoder(features, codebook)
    together = encoder.encode(clips())
    ties = 0
    for merged, wave in zip(together, clips(), strict=True):
        alone = encoder.encode([wave])[0]
        if merged.units.tolist() != alone.units.tolist():
            ties += int((codebook.margins(features([wave])[0]) < 1e-4).sum())
            assert ties, "units differ where no two centroids are equally near"
    assert ties <= 1


def test_saving_keeps_layer_and_normalisation(tmp_path: Path) -> None:
    hubert.save(model("large"), tmp_path, layer=2, normalize=True)
    loaded = hubert.HubertFeatures.load(tmp_path)
    assert (loaded.layer, loaded.normalize, len(loaded.model.encoder.layers)) == (2, True, 2)
    before = hubert.HubertFeatures(model("large"), 2, True)(clips())[0]
    torch.testing.assert_close(loaded(clips())[0], before)


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
def test_bfloat16_is_asked_for_and_gives_nearly_the_same(tmp_path: Path, layout: str) -> None:
    hubert.save(model(layout), tmp_path, layer=2, normalize=False)
    exact, rough = hubert.HubertFeatures.load(tmp_path), hubert.HubertFeatures.load(tmp_path, "bfloat16")
    assert (exact.precision, rough.precision) == ("float32", "bfloat16")
    plain = model(layout).bfloat16()
    plain.encoder.layers[1].register_forward_hook(
        lambda _m, _i, out: captured.append(out[0] if isinstance(out, tuple) else out)
    )
    for wave in clips():
        captured: list[torch.Tensor] = []
        with torch.inference_mode():
            plain(torch.from_numpy(wave).bfloat16()[None])
        wanted, given = exact([wave])[0], rough([wave])[0]
        assert given.dtype == torch.float32
        # Rounding goes far in random layers: what transformers itself loses is the measure.
        assert 0 < (given - wanted).std() < 1.2 * (captured[0][0].float() - wanted).std()
    codebook = Codebook(exact(clips())[0][:20])
    assert SpeechEncoder(exact, codebook).name == "hubert-L2-km20"
    assert SpeechEncoder(rough, codebook).name == "hubert-L2-km20-bfloat16"


@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
def test_bfloat16_where_nothing_is_frozen_as_on_gpus(layout: str) -> None:
    # 16 channels a group: with 8, oneDNN 3.12 gets bfloat16 convolutions wrong where there is AMX (published: 48, 64).
    models = (model(layout, num_conv_pos_embedding_groups=2) for _ in range(2))
    exact, rough = (hubert.HubertFeatures(each, 2, normalize=False) for each in models)
    rough.precision = "bfloat16"
    for wanted, given, alone in zip(
        exact(clips()), rough(clips()), (rough([wave])[0] for wave in clips()), strict=True
    ):
        assert given.dtype == torch.float32 and given.shape == wanted.shape
        assert 1e-4 < (given - wanted).norm() / wanted.norm() < 0.1
        # Alone or together, no worse than rounding.
        assert (given - alone).norm() < 0.1 * wanted.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_gives_the_same_units(tmp_path: Path, precision: hubert.Precision) -> None:
    hubert.save(model("base"), tmp_path, layer=2, normalize=False)
    loaded = hubert.HubertFeatures.load(tmp_path, precision)
    assert loaded.device.type == "cuda"
    frames = hubert.HubertFeatures(model("base"), 2, normalize=False)(clips())
    codebook = Codebook(torch.cat(frames)[::40])
    units = SpeechEncoder(loaded, codebook).encode(clips())
    for found, wanted in zip(units, frames, strict=True):
        same = np.repeat(found.units, found.durations) == codebook.assign(wanted).numpy()
        assert same.mean() > (0.999 if precision == "float32" else 0.9)


def test_frames_are_read_where_they_lie() -> None:
    features = hubert.HubertFeatures(model("base"), 2, normalize=False)
    frames = features(clips())
    codebook = Codebook(torch.cat(frames)[::40])
    for read, made in zip(features(clips(), codebook.assign), frames, strict=True):
        assert torch.equal(read, codebook.assign(made))


@pytest.mark.skipif(not split_products.available(), reason="no AMX or no oneMKL here")
@pytest.mark.parametrize("layout", HUBERT_LAYOUTS)
def test_bfloat16x3_is_float32_by_another_way(tmp_path: Path, layout: str) -> None:
    hubert.save(model(layout), tmp_path, layer=2, normalize=False)
    exact, split = hubert.HubertFeatures.load(tmp_path), hubert.HubertFeatures.load(tmp_path, "bfloat16x3")
    for wanted, given in zip(exact(clips()), split(clips()), strict=True):
        assert 0 < (given - wanted).norm() < 1e-4 * wanted.norm()
    for together, wave in zip(split(clips()), clips(), strict=True):
        torch.testing.assert_close(together, split([wave])[0], atol=1e-4, rtol=1e-4)
    assert SpeechEncoder(split, Codebook(exact(clips())[0][:20])).name == "hubert-L2-km20-bfloat16x3"


def test_bfloat16x3_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_products, "available", lambda: False)
    with pytest.raises(ValueError, match="take float32"):
        hubert.HubertFeatures(model("base"), 2, False).freeze("bfloat16x3")


def test_a_loud_offset_does_not_upset_the_frozen_norm() -> None:
    """Mean and variance over time are had from ten neighbouring samples; a constant must go out of both."""
    wave = clips()[0] * 0.01 + 0.7
    plain, frozen = (hubert.HubertFeatures(model("base"), -1, False) for _ in range(2))
    frozen.freeze()
    torch.testing.assert_close(frozen([wave])[0], plain([wave])[0], atol=2e-4, rtol=1e-3)


def test_a_frozen_model_is_not_trained() -> None:
    features = hubert.HubertFeatures(model("base"), -1, False)
    features.freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        features.forward(torch.zeros(1, 800), [800])


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder\.layer 9: the model has layers 1 to 3"):
        hubert.HubertFeatures(model("base"), 9, False)


def test_frames_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="hop of 160"):
        hubert.scratch({**HUBERT, "conv_stride": (5, 2, 2, 2, 2, 2, 1)}, seed=0)


def test_the_published_frame_count() -> None:
    assert hubert.frame_count(190_800) == 596  # fairseq's own golden file, SPEC 3.4
    assert hubert.frame_count(1_600_000) == 4999


def test_batches_hold_their_budget_and_every_clip_once() -> None:
    lengths = [5, 100, 7, 7, 300, 1, 50]
    batches = batches_by_length(lengths, 210)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 210 for b in batches)
