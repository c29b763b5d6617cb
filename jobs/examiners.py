"""Actors of the evaluation, each of which brings the models that it needs to the node it runs on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from speechgpt.evaluation.conversation import Conversation
from speechgpt.evaluation.examination import Examiner
from speechgpt.evaluation.interview import Interviewer
from speechgpt.evaluation.listening import Listener
from speechgpt.language.config import GenerationSection
from speechgpt.runtime import bundle
from speechgpt.runtime.workspace import Workspace


class BundleListener(Listener):
    """Encoder and vocoder of a bundle. address, store: as `bundle.resolve` takes them."""

    def __init__(self, address: str, store: str, recogniser: str) -> None:
        super().__init__(str(bundle.resolve(address, store)), recogniser)


class BundleConversation(Conversation):
    """A bundle that is asked one question at a time. address, store: as `bundle.resolve` takes them."""

    def __init__(self, address: str, store: str, generation: GenerationSection, threads: int) -> None:
        super().__init__(str(bundle.resolve(address, store)), generation, threads)


class BundleExaminer(Examiner):
    """The language model of a bundle, with its adapter if it has one."""

    def __init__(self, address: str, store: str, generation: GenerationSection) -> None:
        super().__init__(*_of_bundle(address, store), generation)


class BundleInterviewer(Interviewer):
    """As `BundleExaminer`, for `evaluate-instructions`."""

    def __init__(self, address: str, store: str, generation: GenerationSection) -> None:
        super().__init__(*_of_bundle(address, store), generation)


class StageExaminer(Examiner):
    """A model of a workspace, and the adapter on top of it (names in the workspace)."""

    def __init__(self, workspace: Workspace, model: str, adapter: str | None, generation: GenerationSection) -> None:
        with _of_stage(workspace, model, adapter) as directories:
            super().__init__(*directories, generation)


class StageInterviewer(Interviewer):
    """As `StageExaminer`, for `evaluate-instructions`."""

    def __init__(self, workspace: Workspace, model: str, adapter: str | None, generation: GenerationSection) -> None:
        with _of_stage(workspace, model, adapter) as directories:
            super().__init__(*directories, generation)


def _of_bundle(address: str, store: str) -> tuple[str, str | None]:
    directory = bundle.resolve(address, store)
    adapter = directory / "adapter"
    return str(directory / "language"), str(adapter) if adapter.is_dir() else None


@contextmanager
def _of_stage(workspace: Workspace, model: str, adapter: str | None) -> Iterator[tuple[str, str | None]]:
    with ExitStack() as opened:
        directory = opened.enter_context(workspace.fetch(model))
        on_top = opened.enter_context(workspace.fetch(adapter)) if adapter else None
        yield str(directory), str(on_top) if on_top else None
