"""Run by real fairseq's own Python: random text-to-unit Transformers with joined dictionaries and a SentencePiece
model, saved by fairseq's own trainer, and what fairseq makes of text with them.

    python fairseq_text_to_unit.py FOLDER           every model below, with `expected.json` and `logits.npz` beside it

Nothing of this project is imported: what comes out are the published programs' own files.
"""

# isort: off
import fairseq_on_python_311  # noqa: F401  # before fairseq

# isort: on
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from fairseq import tasks
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.optim.adam import FairseqAdamConfig
from fairseq.optim.lr_scheduler.inverse_square_root_schedule import InverseSquareRootLRScheduleConfig
from fairseq.tasks.translation import TranslationConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict

UNITS = 50
SMALL = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_embed_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "max_source_positions": 1024,
    "max_target_positions": 1024,
}
BEFORE = {"encoder_normalize_before": True, "decoder_normalize_before": True}
LEARNED = {"encoder_learned_pos": True, "decoder_learned_pos": True}
SHARED = {"share_all_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    # The command's defaults, with the joined dictionary that the published one has.
    "plain": SHARED,
    "apart": {},
    "before": {**SHARED, **BEFORE},
    "bart": {**SHARED, **LEARNED, "layernorm_embedding": True, "activation_fn": "gelu", "no_scale_embedding": True},
    "normed": {**SHARED, "layernorm_embedding": True},
    "mbart": {**SHARED, **BEFORE, **LEARNED, "layernorm_embedding": True},
}
SENTENCES = ["the bees make honey", "what is the sea", "a bee", "honey is sweet, and the sea is not: zebra"]


def dictionaries(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """`binary/dict.en.txt` and `dict.unit.txt`, equal, and `spm.model`, as the published folder has them."""
    (folder / "binary").mkdir(parents=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES[:3] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spm"), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [processor.id_to_piece(number) for number in range(3, processor.get_piece_size())]
    tokens = ["<lang:unit>", "<lang:en>", *(f"<{unit}>" for unit in range(UNITS)), *pieces]
    for language in ("en", "unit"):
        (folder / "binary" / f"dict.{language}.txt").write_text("".join(f"{token} 1\n" for token in tokens))
    return processor


def make(folder: Path, **changes: Any) -> None:
    processor = dictionaries(folder)
    data = str(folder / "binary")
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.task = OmegaConf.structured(
            TranslationConfig(_name="translation", data=data, source_lang="en", target_lang="unit")
        )
        cfg.criterion = OmegaConf.structured(
            LabelSmoothedCrossEntropyCriterionConfig(_name="label_smoothed_cross_entropy")
        )
        cfg.optimizer = OmegaConf.structured(FairseqAdamConfig(_name="adam"))
        cfg.lr_scheduler = OmegaConf.structured(InverseSquareRootLRScheduleConfig(_name="inverse_sqrt"))
        cfg.common.cpu = True
    arguments = Namespace(_name="transformer", arch="transformer", **{**SMALL, **changes})
    base_architecture(arguments)
    # As fairseq-train leaves it: the settings of a model that is registered as an architecture are a Namespace.
    cfg._set_flag("allow_objects", True)
    with open_dict(cfg):
        cfg.model = arguments
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(0)
    model = task.build_model(cfg.model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(folder / "text2unit.pt"), {"train_iterator": {"epoch": 1}})

    # As the published console does.
    torch.serialization.add_safe_globals([Namespace])
    hub = TransformerModel.from_pretrained(str(folder), checkpoint_file="text2unit.pt", data_name_or_path=data).eval()
    found, logits = [], {}
    for number, sentence in enumerate(SENTENCES):
        source = hub.encode(" ".join(processor.encode(sentence, out_type=str)))
        given = torch.tensor([[2, *draw_units(number)]])
        with torch.no_grad():
            scores, _ = hub.models[0](source[None], torch.tensor([len(source)]), given)
        logits[f"logits{number}"] = scores[0].numpy()
        greedy = hub.generate(source, beam=1, max_len_a=0, max_len_b=30)[0]["tokens"].tolist()
        found.append({"source": source.tolist(), "given": given[0].tolist(), "greedy": greedy})
    (folder / "expected.json").write_text(json.dumps(found))
    np.savez(folder / "logits.npz", **logits)


def draw_units(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(6, 6 + UNITS, 12).tolist()


if __name__ == "__main__":
    for name, settings in MODELS.items():
        make(Path(sys.argv[1], name), **settings)
