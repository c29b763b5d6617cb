"""What a checkpoint's pickle may name: tensors, arrays, containers, and configuration as inert records.

Each entry stands for a function of ours; nothing is imported because a file says so.
"""

import re
from collections import OrderedDict
from typing import Any

from speechgpt.interop import arrays
from speechgpt.interop.pickles import Allowed, Makers, RefusedError, key


def _ordered(pairs: Any = ()) -> OrderedDict:
    made: OrderedDict = OrderedDict()
    for name, value in pairs:
        made[key(name)] = value
    return made


def _encoded(text: str, encoding: str = "") -> bytes:
    """Protocol 2 has no bytes: it writes text and `_codecs.encode(text, "latin1")`."""
    if encoding != "latin1":
        raise RefusedError(f"_codecs.encode with {encoding!r:.40}")
    return text.encode("latin-1")


def _bytes(data: Any = b"") -> bytes:
    if not isinstance(data, bytes | bytearray):
        raise RefusedError("builtins.bytes of something else than bytes")
    return bytes(data)


_NUMPY = ("numpy.core.", "numpy._core.")

_MAKERS: Makers = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda _factory=None: {},
    "builtins.dict": lambda: {},
    "builtins.list": lambda items=(): list(items),
    "builtins.set": lambda items=(): set(map(key, items)),
    "builtins.frozenset": lambda items=(): frozenset(map(key, items)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _encoded,
    "torch._utils._rebuild_tensor": arrays.tensor,
    "torch._utils._rebuild_tensor_v2": arrays.tensor,
    "torch._utils._rebuild_parameter": arrays.parameter,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *words: ":".join(map(str, words)),
    "numpy.dtype": arrays.ArrayType,
    **{f"{core}multiarray._reconstruct": arrays.Array for core in _NUMPY},
    **{f"{core}multiarray.scalar": arrays.scalar for core in _NUMPY},
    **{f"{core}numeric._frombuffer": arrays.from_buffer for core in _NUMPY},
    "joblib.numpy_pickle.NumpyArrayWrapper": arrays.FollowingArray,
    "sklearn.externals.joblib.numpy_pickle.NumpyArrayWrapper": arrays.FollowingArray,
}

KMEANS = re.compile(r"sklearn\.cluster\.(_kmeans|k_means_)\.(MiniBatch)?KMeans")
CONFIGURATION_OBJECTS = re.compile(
    r"argparse\.Namespace"
    r"|fairseq\.dataclass\.(configs\.[A-Z]\w*|constants\.[A-Z]\w*|utils\.[A-Z]\w*)"
    r"|fairseq\.(tasks|models|criterions|optim)(\.[a-z_0-9]+)+\.[A-Z]\w*(Config|Choices|CHOICES)"
    r"|omegaconf\.(dictconfig\.DictConfig|listconfig\.ListConfig|nodes\.[A-Z]\w*Node"
    r"|base\.(Metadata|ContainerMetadata))"
)
_RECORDS = re.compile(
    f"{CONFIGURATION_OBJECTS.pattern}|{KMEANS.pattern}"
    r"|fairseq\.data\.dictionary\.Dictionary"
    r"|fairseq\.(meters|logging\.meters)\.[A-Z]\w*Meter|fairseq\.logging\.meters\.MetersDict"
    # A k-means keeps the random state it was fitted with.
    r"|numpy\.random\._pickle\.__(randomstate|bit_generator)_ctor|numpy\.random\.__RandomState_ctor"
)
_MERE_NAMES = re.compile(
    r"builtins\.(int|float|str|bool|tuple|object|NoneType)"
    r"|copyreg\.(_reconstructor|__newobj__)"
    r"|typing\.(Any|Dict|List|Tuple|Optional|Union)"
    r"|numpy\.ndarray|numpy\.random\._mt19937\.MT19937"
    r"|torch\.(float(16|32|64)|bfloat16|int(8|16|32|64)|uint8|bool)"
)

CHECKPOINTS = Allowed(
    makers=_MAKERS,
    is_record=lambda path: _RECORDS.fullmatch(path) is not None,
    is_mere_name=lambda path: path in arrays.STORAGES or _MERE_NAMES.fullmatch(path) is not None,
)
