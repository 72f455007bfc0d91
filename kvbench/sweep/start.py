"""Starts a sweep as its choices say: in this process, or in several."""

from kvbench.sweep.command import Choices, SweepResult, run_sweep
from kvbench.sweep.progress import Listener


def start(choices: Choices, listener: Listener | None = None) -> SweepResult:
    """Measure what is not measured yet; see `kvbench.sweep.command.run_sweep`."""
    if choices.ray is not None:
        from kvbench.sweep.on_ray import run_on_ray

        return run_on_ray(choices, listener)
    if choices.workers > 1:
        from kvbench.sweep.workers import run_workers

        return run_workers(choices, listener)
    return run_sweep(choices, listener)
