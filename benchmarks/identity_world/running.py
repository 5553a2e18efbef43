"""Runs the parts in several processes, with a progress bar for each."""

import multiprocessing
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from queue import Empty, Queue

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .parts import BASE, RECIPES, Plan, read_part, run_part


PROGRESS_EVERY = 10

Job = tuple[int, str]

# Of a worker: where it tells how far it is.
_steps: Queue | None = None


def run_all(folder: Path, plan: Plan, seeds: list[int], workers: int, console: Console) -> None:
    """
    Runs the parts that are not finished, those of one seed after its base.

    Args:
        folder (`pathlib.Path`): Where the parts are kept.
        plan ([`Plan`]): How models are trained.
        seeds (`list[int]`): The seeds.
        workers (`int`): Processes, each of which uses one core.
        console (`rich.console.Console`): Where the progress is shown.
    """
    total = {part: plan.num_steps(part) for part in (BASE, *RECIPES)}
    jobs = [(seed, part) for part in total for seed in seeds]
    left = [job for job in jobs if read_part(folder, *job) is None]
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn())
    with (
        context.Manager() as manager,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        steps = manager.Queue()
        bars = {job: progress.add_task(f"seed {job[0]}: {job[1]}", total=total[job[1]], start=False) for job in left}
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_remember, initargs=(steps,))
        running: dict[Future, Job] = {}
        try:
            while left or running:
                without_base = {seed for seed, part in (*left, *running.values()) if part == BASE}
                ready = [job for job in left if job[1] == BASE or job[0] not in without_base]
                # One for each process, so that the first parts of all seeds come before the last ones of any.
                for job in ready[: workers - len(running)]:
                    left.remove(job)
                    running[pool.submit(_work, folder, plan, *job)] = job
                finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                _show(steps, progress, bars)
                for future in finished:
                    future.result()
                    progress.update(bars[running[future]], completed=total[running[future][1]])
                    del running[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _remember(steps: Queue) -> None:
    global _steps
    _steps = steps


def _work(folder: Path, plan: Plan, seed: int, part: str) -> None:
    def after_step(step: int) -> None:
        if step % PROGRESS_EVERY == 0:
            _steps.put(((seed, part), step))

    run_part(folder, plan, seed, part, after_step)


def _show(steps: Queue, progress: Progress, bars: dict) -> None:
    while True:
        try:
            job, step = steps.get_nowait()
        except Empty:
            return
        progress.start_task(bars[job])
        progress.update(bars[job], completed=step)
