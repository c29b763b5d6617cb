"""The installed code as one zip file that a cluster can put on its workers' path.

It holds what the wheel holds (the import packages and the distribution's metadata, so that entry points are found
too), whether the package is installed or used from its source tree. The bytes depend on the content alone: Ray names
an uploaded archive by its hash, so equal code is uploaded once.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time a zip file can hold: a file's age is no part of what it says."""


def write_code_archive(target: Path, packages: Iterable[str], distribution: str, extra: Mapping[str, bytes]) -> None:
    """Write `packages` as they would be imported here, `distribution`'s metadata, and `extra` files by name.

    Raises ModuleNotFoundError for a package and PackageNotFoundError for a distribution that is not installed.
    """
    members = dict(extra)
    for package in packages:
        members |= {name: path.read_bytes() for name, path in _modules(package)}
    members |= dict(_metadata(distribution))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, members[name])


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {package!r} to send to the cluster")
    for location in map(Path, spec.submodule_search_locations):
        for path in location.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(location).as_posix()}", path


def _metadata(distribution: str) -> Iterator[tuple[str, bytes]]:
    installed = metadata.distribution(distribution)
    directory = f"{distribution.replace('-', '_')}-{installed.version}.dist-info"
    # An egg-info directory, which a source tree may carry, calls METADATA by its old name.
    yield f"{directory}/METADATA", (installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "").encode()
    yield f"{directory}/entry_points.txt", (installed.read_text("entry_points.txt") or "").encode()
