"""What Ray Train keeps of a run in the workspace, and when it must be thrown away."""

from collections.abc import Callable

from speechgpt.runtime.workspace import Workspace, WorkspaceError


def forget_broken_run(workspace: Workspace, run: str, say: Callable[[str], None]) -> None:
    """Remove a run whose index of checkpoints cannot be read, which a kill while it was being written leaves behind."""
    index = f"{run}/checkpoint_manager_snapshot.json"
    if not workspace.exists(index):
        return
    try:
        listed = [entry["checkpoint_dir_name"] for entry in workspace.read_json(index)["checkpoint_results"]]
        problem = next((f"{name} is missing" for name in listed if not workspace.exists(f"{run}/{name}")), "")
    except (WorkspaceError, KeyError, TypeError) as error:
        problem = f"its index cannot be read ({error})"
    if problem:
        say(f"{run}: {problem}; the stage starts again")
        workspace.delete(run)
