"""How good speech would sound to people, predicted, from 1 to 5: DNSMOS P.835 (Reddy et al., 2022), overall, and
DistillMOS (Stahl and Gamper, 2025)."""

import contextlib
import io
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

_SAMPLES = 144_160
"""9.01 s at 16 kHz, which the network takes; a shorter clip is repeated until it is as long."""
_OVERALL = np.poly1d([-0.06766283, 1.11546468, 0.04602535])
"""From the network's own scale to that of the listeners (speechmos, `get_polyfit_val`)."""


class Rater(Protocol):
    def rate(self, waves: Sequence[np.ndarray]) -> list[float]:
        """Of each wave (float32 [samples], 16 kHz, not empty)."""
        ...


def raters(threads: int = 1) -> dict[str, Rater]:
    """Those that are installed, by name. Raises ModuleNotFoundError for want of DNSMOS; DistillMOS may be absent."""
    found: dict[str, Rater] = {"dnsmos": DnsMos(threads)}
    if find_spec("distillmos"):
        found["distillmos"] = DistillMos()
    return found


class DistillMos:
    """The network that comes with the package distillmos."""

    def __init__(self) -> None:
        import torch

        # It imports torchaudio for its own command line, which is not used here, and a CUDA build of it breaks torch.
        absent = "torchaudio" not in sys.modules
        if absent:
            sys.modules["torchaudio"] = ModuleType("torchaudio")
        try:
            from distillmos.sqa import ConvTransformerSQAModel

            with contextlib.redirect_stdout(io.StringIO()):
                self._model = ConvTransformerSQAModel().eval()
        finally:
            if absent:
                del sys.modules["torchaudio"]
        self._torch = torch

    def rate(self, waves: Sequence[np.ndarray]) -> list[float]:
        with self._torch.inference_mode():
            return [float(self._model(self._torch.from_numpy(wave[None].astype(np.float32)))) for wave in waves]


class DnsMos:
    """The network that comes with the package speechmos. Raises ModuleNotFoundError if it is not installed."""

    def __init__(self, threads: int = 1) -> None:
        from onnxruntime import InferenceSession, SessionOptions

        package = find_spec("speechmos")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError("speechmos is not installed: pip install 'speechgpt-ray[judge]'")
        options = SessionOptions()
        options.intra_op_num_threads = threads
        model = Path(package.submodule_search_locations[0], "dnsmos_models", "sig_bak_ovr.onnx")
        self._session = InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def rate(self, waves: Sequence[np.ndarray]) -> list[float]:
        """Of each wave (float32 [samples], 16 kHz, not empty), the mean over its stretches of 9 s."""
        return [float(np.mean([self._stretch(piece) for piece in _stretches(wave)])) for wave in waves]

    def _stretch(self, piece: np.ndarray) -> float:
        [scores] = self._session.run(None, {"input_1": piece[None]})
        return float(_OVERALL(scores[0, 2]))


def _stretches(wave: np.ndarray) -> list[np.ndarray]:
    repeated = np.tile(wave.astype(np.float32), -(-_SAMPLES // len(wave))) if len(wave) < _SAMPLES else wave
    last = len(repeated) - _SAMPLES if len(wave) >= _SAMPLES else 0
    return [np.ascontiguousarray(repeated[at : at + _SAMPLES], np.float32) for at in range(0, last + 1, 16_000)]
