"""Published instruction files inside the job `instructions`: cut into ranges of lines, one part of the rows a range.

A part is named by its file, its first line and the hash of its lines, so that a job that was killed goes on where it
was, and equal content ends in equal bytes. One process holds one range at a time, however long the files are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from jobs.shell import JobError

if TYPE_CHECKING:
    from speechgpt.interop.instruction_rows import PublishedRows
    from speechgpt.language.instructions import Refusal, Row
    from speechgpt.recipe import Recipe
    from speechgpt.runtime.line_ranges import LineRange

RANGE_BYTES = 16 << 20
"""Text of one part: some 12,000 rows of speech."""


@dataclass(frozen=True)
class PublishedPart:
    """A range of lines and the part of the rows that it becomes. name: the file's, in ids.

    address: the file for workers, whose working directory is another.
    """

    file: str
    name: str
    range: "LineRange"
    address: str

    @property
    def part(self) -> str:
        """Its file in a directory of parts."""
        return f"published-{self.name}-{self.range.first_line:010d}-{self.range.sha256[:16]}.parquet"


def plan(files: Sequence[str], size: int = RANGE_BYTES) -> Iterator[PublishedPart]:
    """The parts of files, in their order. Raises JobError naming a file that cannot be read."""
    from speechgpt.runtime.files import absolute
    from speechgpt.runtime.line_ranges import cut

    for file, name in zip(files, names(files), strict=True):
        try:
            for each in cut(file, size):
                yield PublishedPart(file, name, each, absolute(file))
        except OSError as error:
            said = str(error) if file in str(error) else f"{file} cannot be read: {error}"
            raise JobError(f"instructions.published: {said}") from None


def check(file: str) -> None:
    """Raise JobError unless the file is there and its first row can be read."""
    from speechgpt.interop.speech_instruct import PublishedRowError, form_of, read_line

    try:
        number, line = next(_first_lines(file))
        read_line(line, form_of(file))
    except StopIteration:
        raise JobError(f"instructions.published: {file} is empty") from None
    except PublishedRowError as error:
        raise JobError(f"instructions.published: {error.at(file, number)}") from None


def _first_lines(file: str) -> Iterator[tuple[int, bytes]]:
    from speechgpt.runtime.line_ranges import read

    for each in plan([file], 1):
        for _, lines in read(file, [each.range]):
            yield from lines


def names(files: Sequence[str]) -> list[str]:
    """A name for each file, from its own, and different from the others'."""
    found: list[str] = []
    for file in files:
        stem = PurePosixPath(file.removesuffix(".gz")).stem
        name, number = stem, 2
        while name in found:
            name, number = f"{stem}.{number}", number + 1
        found.append(name)
    return found


def tasks(parts: Iterable[PublishedPart]) -> list[list[PublishedPart]]:
    """What is read in one go: a range of a plain file; of a compressed one, which only opens from its start, all."""
    grouped: dict[object, list[PublishedPart]] = {}
    for each in parts:
        grouped.setdefault(each.name if each.file.endswith(".gz") else each, []).append(each)
    return list(grouped.values())


def rows_of(
    group: Sequence[PublishedPart], made: "PublishedRows"
) -> "Iterator[tuple[PublishedPart, Iterator[list[Row] | list[Refusal]]]]":
    """Each part of one file with what its lines become, one line at a time."""
    from speechgpt.runtime.line_ranges import read

    file, name = group[0].file, group[0].name
    of = {each.range: each for each in group}
    for each, lines in read(group[0].address, list(of)):
        yield of[each], made.of_lines(file, name, lines)


def maker(recipe: "Recipe") -> "PublishedRows":
    """How the recipe takes published rows."""
    from speechgpt.interop.instruction_rows import PublishedRows
    from speechgpt.language.prompts import PromptFormat
    from speechgpt.language.row_filter import RowFilter

    section = recipe.instructions
    blocks: dict[str, int] = {}
    for stage in recipe.stages.values():
        for kind, weight in stage.mixture.items():
            if weight > 0:
                blocks[kind] = max(blocks.get(kind, 0), stage.block)
    units = section.filters.units or recipe.codebook.clusters
    row_filter = RowFilter(section.filters, section.max_answer_words, units, blocks)
    return PublishedRows(row_filter, PromptFormat.of(recipe.language) if section.rewrite_published else None)


def sections(recipe: "Recipe") -> tuple[str, ...]:
    """Parts of the recipe that published rows depend on beyond `instructions`."""
    if not recipe.instructions.published:
        return ()
    stages = [f"stages.{name}.{key}" for name in recipe.stages for key in ("mixture", "block")]
    return ("codebook.clusters", *stages)


def refuse_unreadable(done: Sequence[dict[str, Any]], lines: int, limit: float, where: str) -> None:
    """Raise JobError once more than `limit` of all lines are no rows: such a file is of another format."""
    bad = sum(each["unreadable"] for each in done)
    if bad > limit * lines:
        first = next(each["first"] for each in done if each["unreadable"])
        raise JobError(
            f"instructions.published: {bad} of {lines} lines are no rows, more than data.max_bad_fraction = {limit:g} "
            f"allows; they are listed in {where}. The first: {first}"
        )
