"""The service that `bench serve` measures: a bundle that speaks for as long as it is asked to, on its own Serve."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unending(language: Path) -> None:
    """Make the model in this directory go on speaking until it is cut.

    Its weights stay but for one row: what closes speech is as likely as units are on average, so some unit is always
    likelier.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from speechgpt.language.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(language)
    model = AutoModelForCausalLM.from_pretrained(language, dtype="auto")
    # The input's embedding may be the same tensor.
    model.config.tie_word_embeddings = False
    output = model.get_output_embeddings().weight.detach().clone()
    units = slice(vocabulary.first_unit, vocabulary.first_unit + vocabulary.unit_count)
    output[vocabulary.eosp] = output[units].float().mean(0).to(output.dtype)
    model.get_output_embeddings().weight = torch.nn.Parameter(output, requires_grad=False)
    model.save_pretrained(language)


@contextmanager
def talkative(bundle: str) -> Iterator[Path]:
    """A bundle's directory, with a model that is `unending`: every answer is of the length that is asked for."""
    from speechgpt.recipe import load
    from speechgpt.runtime import bundle as bundles

    opened = bundles.load(bundle, load("nano").tracking.uri)
    with tempfile.TemporaryDirectory() as folder:
        language, directory = Path(folder, "language"), Path(folder, "bundle")
        shutil.copytree(opened.directory / "language", language)
        unending(language)
        directory.mkdir()
        parts = {part.name: part for part in opened.directory.iterdir() if part.is_dir()}
        bundles.write(directory, parts | {"language": language}, opened.manifest["unit_vocabulary"], {})
        yield directory


@contextmanager
def served(bundle: Path, tokens: int, overrides: tuple[str, ...] = ()) -> Iterator[str]:
    """Its URL, when it has started as `speechgpt serve --set` starts it, one replica of each. tokens: of an answer."""
    from serve.bundles import find
    from serve.run import start, stop
    from speechgpt.recipe import load

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = (f"serving.{part}.max_replicas=1" for part in ("gateway", "encoder", "language", "vocoder"))
    chosen = load("nano", (*one, f"serving.port={port}", f"generation.max_new_tokens={tokens}", *overrides))
    source = find(str(bundle), chosen.tracking.uri)
    start(source, chosen)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(source)
