"""Lines of published files as instruction rows of ours, or as refusals that say why."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from speechgpt.interop.speech_instruct import Form, PublishedRowError, form_of, read, read_line, rewrite
from speechgpt.language.instructions import Refusal, Row
from speechgpt.language.prompts import PromptFormat
from speechgpt.language.row_filter import RowFilter

UNKNOWN = "published"
"""Kind of a refused line whose own kind is not known."""


@dataclass(frozen=True)
class PublishedRows:
    """Makes rows of lines.

    row_filter: what is refused. prompts: the format that rows are rewritten in; None keeps them byte for byte.

    Reasons of its refusals: `unreadable`, `broken_markers`, and those of `language.row_filter`; a row that several
    speak against is refused for each.
    """

    row_filter: RowFilter
    prompts: PromptFormat | None = None

    def of_lines(self, file: str, name: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[list[Row] | list[Refusal]]:
        """For each (line number, line) its one row, or its refusals. name: the file's in ids and as the category.

        Ids are `KIND-NAME-LINE`; refusals name `NAME-LINE`.
        """
        form = form_of(file)
        for number, line in lines:
            try:
                yield self._of_line(f"{name}-{number}", name, line, form, f"{file}, line {number}")
            except PublishedRowError as error:
                yield [Refusal(f"{name}-{number}", UNKNOWN, error.reason, error.at(file, number))]

    def _of_line(self, source: str, category: str, line: bytes, form: Form, where: str) -> list[Row] | list[Refusal]:
        text = read_line(line, form)
        row = read(text)
        reasons = self.row_filter.reasons(row.kind, text.prefix, row.exchanges, row.units)
        if reasons:
            return [Refusal(source, row.kind, reason, where) for reason in reasons]
        if self.prompts:
            text = rewrite(row, self.prompts.dialect, self.prompts.prefix)
        return [Row(f"{row.kind}-{source}", row.kind, text.prefix, text.plain_text, category, "train")]
