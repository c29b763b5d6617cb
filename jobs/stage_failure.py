"""Why a training failed, in words: what its workers raised, not where Ray passed it on."""

from typing import TYPE_CHECKING, Any

from jobs.shell import JobError

if TYPE_CHECKING:
    from ray.train import Result
    from ray.train.torch import TorchTrainer


def fitted(trainer: "TorchTrainer", what: str) -> "Result":
    """What the training gives. Raises JobError saying why `what` failed, when its workers have failed too often."""
    import ray.train

    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise JobError(f"{what} failed, and engine.max_failures is spent: {reason(error)}") from error


def reason(error: Any) -> str:
    """One line for each different thing that the workers of a `ray.train.TrainingFailedError` died of.

    Ranks that only lost their peers come after the one that they lost, if that one could still say why it failed.
    """
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return _last_line(getattr(error, "controller_failure", error))
    ranks: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        ranks.setdefault(_last_line(failure), []).append(rank)
    said = sorted(ranks, key=_is_collateral)
    return "; ".join(f"{line} (worker {', '.join(map(str, ranks[line]))})" for line in said)


def _last_line(failure: BaseException) -> str:
    """The exception itself; of one that Ray carried home as text, the end of its traceback."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__


def _is_collateral(line: str) -> bool:
    return any(sign in line for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe"))
