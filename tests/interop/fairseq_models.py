"""Run by real fairseq's own Python: random models of true architecture, saved by fairseq's own trainer, and what
fairseq makes of given sound and units with them.

    python fairseq_models.py make FOLDER            every model below, with `expected.npz` beside it
    python fairseq_models.py again FOLDER           what fairseq makes of each `MODEL/back.pt`, into `MODEL/again.npz`

Nothing of this project is imported: what comes out are the published programs' own files.
"""

# isort: off
import fairseq_on_python_311  # noqa: F401  # before fairseq

# isort: on
import json
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.criterions.hubert_criterion import HubertCriterionConfig
from fairseq.data.dictionary import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.examples.hubert.simple_kmeans.dump_km_label import ApplyKmeans
from fairseq.examples.hubert.simple_kmeans.learn_kmeans import get_km_model
from fairseq.models.hubert import HubertConfig
from fairseq.models.text_to_speech.codehifigan import CodeGenerator
from fairseq.models.text_to_speech.vocoder import CodeHiFiGANVocoder
from fairseq.optim.adam import FairseqAdamConfig
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import PolynomialDecayLRScheduleConfig
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict

SMALL = {
    "encoder_layers": 4,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "final_dim": 16,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
HUBERTS: dict[str, dict[str, Any]] = {
    "small-base": {"model": SMALL, "normalize": False, "layer": 3},
    "small-large": {"model": {**SMALL, **LARGE, "untie_final_proj": True}, "normalize": True, "layer": 4},
    "small-base-normalized": {"model": SMALL, "normalize": True, "layer": 2},
    "small-without-projection": {"model": {**SMALL, "encoder_embed_dim": 16}, "normalize": False, "layer": 4},
    # fairseq's own defaults with what its hubert_base_librispeech.yaml changes of them.
    "base": {"model": {"final_dim": 256, "encoder_layerdrop": 0.05}, "normalize": False, "layer": 11},
}

PUBLISHED = {
    "resblock": "1",
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 512,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_embeddings": 1000,
    "embedding_dim": 128,
    "model_in_dim": 128,
    "segment_size": 8960,
    "code_hop_size": 320,
    "f0": False,
    "sampling_rate": 16000,
}
LITTLE = {**PUBLISHED, "upsample_initial_channel": 64, "num_embeddings": 100, "embedding_dim": 16, "model_in_dim": 16}


def durations(width: int) -> dict[str, Any]:
    predictor = {"encoder_embed_dim": width, "var_pred_hidden_dim": width, "var_pred_kernel_size": 3}
    return {"dur_prediction_weight": 1.0, "dur_predictor_params": {**predictor, "var_pred_dropout": 0.5}}


SPEAKERS = {"multispkr": "single", "num_speakers": 7, "model_in_dim": 32}
VOCODERS: dict[str, dict[str, Any]] = {
    "published": {"config": {**PUBLISHED, **durations(128)}},
    "single": {"config": LITTLE},
    "single-durations": {"config": {**LITTLE, **durations(16)}, "legacy": True},
    "speakers": {"config": {**LITTLE, **SPEAKERS}, "speaker": 5},
    "speakers-durations": {"config": {**LITTLE, **SPEAKERS, **durations(16)}, "speaker": 2},
    # What each program takes for a `model_in_dim` that config.json leaves out.
    "silent-80": {"config": {**LITTLE, "embedding_dim": 80, "model_in_dim": 80}, "silent": True},
    "silent-128": {"config": {**LITTLE, "embedding_dim": 128, "model_in_dim": 128}, "silent": True},
}


def disturb(model: torch.nn.Module, scale: float, seed: int) -> None:
    """A fresh model's weights are too small and too regular to tell much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def enliven(generator: torch.nn.Module) -> None:
    """Lengths of weights with which a signal neither dies on its way through the layers nor drowns in tanh."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("weight_g"):
                length = 0.2 if "conv_post" in name else 0.9
                parameter.copy_(length * (1 + 0.2 * torch.randn(parameter.shape, generator=draw)))


def clips(base: bool) -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    lengths = [24_000] if base else [16_000, 9_001, 400, 32_123]
    sweep = [np.sin(np.cumsum(np.linspace(0.02, 1.5, n))) * draw.uniform(0.1, 0.5) for n in lengths]
    return [(wave + 0.1 * draw.normal(size=len(wave)) + 0.05).astype(np.float32) for wave in sweep]


def make_hubert(folder: Path, model: dict[str, Any], normalize: bool, layer: int) -> None:
    """`hubert.pt` by fairseq's trainer, with its optimiser's state, `km.bin` by its simple_kmeans."""
    (folder / "dict.km.txt").write_text("".join(f"{i} 1\n" for i in range(20)))
    cfg = OmegaConf.structured(FairseqConfig)
    task = HubertPretrainingConfig(
        _name="hubert_pretraining", data=str(folder), labels=["km"], label_rate=50.0, normalize=normalize
    )
    with open_dict(cfg):
        cfg.model = OmegaConf.structured(HubertConfig(_name="hubert", label_rate=50.0, **model))
        cfg.task = OmegaConf.structured(task)
        cfg.criterion = OmegaConf.structured(HubertCriterionConfig(_name="hubert"))
        cfg.optimizer = OmegaConf.structured(FairseqAdamConfig(_name="adam"))
        schedule = PolynomialDecayLRScheduleConfig(_name="polynomial_decay", total_num_update=10.0)
        cfg.lr_scheduler = OmegaConf.structured(schedule)
        cfg.common.cpu = True
    made_task = tasks.setup_task(cfg.task)
    torch.manual_seed(0)
    built = made_task.build_model(cfg.model)
    disturb(built, 0.02 if "encoder_layers" not in model else 0.15, seed=1)
    torch.save(built.state_dict(), folder / "weights.pt")
    trainer = Trainer(cfg, made_task, built, made_task.build_criterion(cfg.criterion))
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(folder / "hubert.pt"), {"train_iterator": {"epoch": 1}})

    waves = clips(base="encoder_layers" not in model)
    features = extract(folder / "hubert.pt", layer, waves)
    frames = torch.cat(features).numpy()
    torch.manual_seed(2)
    np.random.seed(0)
    kmeans = get_km_model(min(50, len(frames) // 2), "k-means++", 100, 10_000, 0.0, 100, 20, 0.0)
    kmeans.fit(frames)
    joblib.dump(kmeans, folder / "km.bin")
    assign = ApplyKmeans(str(folder / "km.bin"))
    arrays = {f"clip{i}": wave for i, wave in enumerate(waves)}
    arrays |= {f"features{i}": each.numpy() for i, each in enumerate(features)}
    arrays |= {f"units{i}": assign(each) for i, each in enumerate(features)}
    np.savez(folder / "expected.npz", layer=layer, normalize=normalize, centroids=kmeans.cluster_centers_, **arrays)


def extract(file: Path, layer: int, waves: list[np.ndarray]) -> list[torch.Tensor]:
    """As examples/hubert/simple_kmeans/dump_hubert_feature.py does, which wants a GPU."""
    torch.serialization.add_safe_globals([Dictionary])
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(file)])
    model = models[0].eval()
    features = []
    with torch.no_grad():
        for wave in map(torch.from_numpy, waves):
            x = torch.nn.functional.layer_norm(wave, wave.shape) if task.cfg.normalize else wave
            found, _ = model.extract_features(source=x[None], padding_mask=None, mask=False, output_layer=layer)
            features.append(found[0])
    return features


def make_vocoder(
    folder: Path, config: dict[str, Any], speaker: int | None = None, legacy: bool = False, silent: bool = False
) -> None:
    """`g_00000010` and `config.json`; legacy: in the container that torch wrote before 1.6."""
    torch.manual_seed(0)
    generator = CodeGenerator(config)
    disturb(generator, 0.02, seed=1)
    enliven(generator)
    if generator.dur_predictor is not None:
        with torch.no_grad():
            generator.dur_predictor.proj.bias.fill_(1.2)
    file = folder / "g_00000010"
    torch.save({"generator": generator.state_dict()}, file, _use_new_zipfile_serialization=not legacy)
    written = {name: value for name, value in config.items() if not (silent and name == "model_in_dim")}
    (folder / "config.json").write_text(json.dumps(written))

    vocoder = CodeHiFiGANVocoder(str(file), config)
    predicts = "dur_predictor_params" in config
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for index, length in enumerate((30,) if config["num_embeddings"] == 1000 else (40, 1, 7)):
        code = torch.from_numpy(draw.integers(config["num_embeddings"], size=(1, length)))
        voice = {} if speaker is None else {"spkr": torch.tensor([[speaker]])}
        wave = vocoder({"code": code.clone(), **voice}, dur_prediction=predicts)
        arrays |= {f"code{index}": code[0].numpy(), f"wave{index}": wave.numpy()}
        if predicts:
            with torch.no_grad():
                log = vocoder.model.dur_predictor(vocoder.model.dict(code))
            arrays[f"durations{index}"] = torch.clamp(torch.round(torch.exp(log) - 1).long(), min=1)[0].numpy()
    np.savez(folder / "expected.npz", speaker=-1 if speaker is None else speaker, **arrays)


def make(folder: Path) -> None:
    for name, hubert in HUBERTS.items():
        (folder / name).mkdir(parents=True)
        make_hubert(folder / name, **hubert)
    for name, vocoder in VOCODERS.items():
        (folder / name).mkdir()
        make_vocoder(folder / name, **vocoder)


def again(folder: Path) -> None:
    for file in folder.glob("*/back.pt"):
        with np.load(file.with_name("expected.npz")) as held:
            waves = [held[f"clip{i}"] for i in range(sum(name.startswith("clip") for name in held))]
            found = extract(file, int(held["layer"]), waves)
        np.savez(file.with_name("again.npz"), **{f"features{i}": each.numpy() for i, each in enumerate(found)})


if __name__ == "__main__":
    {"make": make, "again": again}[sys.argv[1]](Path(sys.argv[2]))
