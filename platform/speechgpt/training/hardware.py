"""What a GPU or a core can do and what an hour of it costs: a table that users edit."""

import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import Field, ValidationError

from speechgpt.section import Section

FILE = "hardware.yaml"
GIB = 1 << 30


class HardwareError(ValueError):
    """A table that cannot be read, or a kind that it does not have."""


class KindSection(Section):
    """One kind of GPU, or the share of a machine that one worker on a CPU has."""

    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0)
    """Dense bf16 operations a second / 10^12."""
    per_hour: float = Field(ge=0)
    per_node: int = Field(ge=1)
    node_memory_gib: float = Field(gt=0)
    """Of the host that `per_node` of them sit in."""
    node_disk_gib: float = Field(0, ge=0)
    """Of its local NVMe disks."""
    device: str = ""
    """A pattern of the name that torch gives it."""


class PricesSection(Section):
    as_of: str
    source: str
    currency: str = "USD"


class HardwareSection(Section):
    """The whole table."""

    prices: PricesSection
    mfu: float = Field(gt=0, le=1)
    """Assumed share of the peak that the model's own operations get."""
    checkpointing_speed: float = Field(0.75, gt=0, le=1)
    """Speed with gradient checkpointing against without."""
    reserved_gib: float = Field(2.0, ge=0)
    fragmentation: float = Field(0.06, ge=0, lt=1)
    gpus: dict[str, KindSection] = {}
    cpus: dict[str, KindSection] = {}


class Machines(NamedTuple):
    """So many of one kind."""

    number: int
    name: str
    kind: KindSection
    gpu: bool

    @property
    def nodes(self) -> int:
        return -(-self.number // self.kind.per_node)

    def usable_bytes(self, table: HardwareSection) -> int:
        """Memory that a worker's tensors may take."""
        if not self.gpu:
            return int(self.kind.memory_gib * GIB)
        return int((self.kind.memory_gib * (1 - table.fragmentation) - table.reserved_gib) * GIB)


def load(path: str | Path | None = None) -> HardwareSection:
    """The shipped table or the user's. Raises HardwareError naming the file and the key."""
    name = str(path or "the shipped table")
    try:
        text = Path(path).read_text() if path else resources.files("speechgpt.training").joinpath(FILE).read_text()
        return HardwareSection.model_validate(yaml.safe_load(text))
    except (OSError, yaml.YAMLError) as error:
        raise HardwareError(f"{name}: cannot be read: {error}") from None
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()]
        raise HardwareError(f"{name}: {'; '.join(problems)} (copy training/{FILE} and edit it)") from None


def parse(asked: str, table: HardwareSection) -> Machines:
    """`16xA100-80` or `2xCPU`. Raises HardwareError with the kinds there are."""
    count, _, name = asked.partition("x")
    if not count.isdecimal() or int(count) < 1 or not name:
        raise HardwareError(f"{asked!r}: a count and a kind are expected, such as 16xA100-80 or 2xCPU")
    for kinds, gpu in ((table.gpus, True), (table.cpus, False)):
        if name in kinds:
            return Machines(int(count), name, kinds[name], gpu)
    known = sorted({**table.gpus, **table.cpus})
    raise HardwareError(f"{asked!r}: no kind {name!r} in the table; it has {known} (yours with --prices FILE)")


def peak_of(device_name: str, table: HardwareSection) -> float | None:
    """Dense bf16 operations a second of the GPU that torch calls so; None if the table does not know it."""
    for kind in table.gpus.values():
        if kind.device and re.search(kind.device, device_name):
            return kind.tflops * 1e12
    return None
