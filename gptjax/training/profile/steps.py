"""Profiles some steps of a run: JAX's trace, a table and a page (`--train.profile`)."""

from pathlib import Path

import jax

from gptjax.config import ExperimentConfig, InputError
from gptjax.costs.hlo import read_program
from gptjax.system.disk import replacing
from gptjax.training.mfu import peak_bandwidth, peak_flops
from gptjax.training.profile.page import page
from gptjax.training.profile.parts import Peaks, containers, step_times
from gptjax.training.profile.table import table
from gptjax.training.profile.timeline import read_timeline

PROFILE_TRACE, PROFILE_PAGE = "profile", "profile.html"


class StepProfile:
    """The profile of the steps of `train.profile`, which `fit` starts and stops.

    Of several processes the first one's devices are profiled.
    """

    def __init__(self, config: ExperimentConfig, directory: Path):
        """Take the run's config and directory."""
        self._config = config
        self._directory = directory
        self._first = 0
        self._tracing = False

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop a trace whose last step was not made, which would refuse the next one."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def starts(self, done: int) -> bool:
        """Whether the first profiled step follows `done` steps."""
        window = self._config.train.profiled
        return not self._first and window.start <= done + 1 < window.stop

    def start(self, done: int) -> None:
        """Start the trace, after `done` steps."""
        self._first = done + 1
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Every call of a Python function would take its time.
        options.host_tracer_level = 1
        jax.profiler.start_trace(self._directory / PROFILE_TRACE, profiler_options=options)
        self._tracing = True

    def ends(self, done: int) -> bool:
        """Whether `done` is the last profiled step, and the trace is on."""
        return self._tracing and done == self._config.train.profiled[-1]

    def stop(self, compiled: jax.stages.Compiled, tokens: int) -> None:
        """Stop the trace, print the table and write the page.

        Args:
          compiled: the step's program.
          tokens: of a step, on one device.
        """
        self._tracing = False
        jax.profiler.stop_trace()
        steps = range(self._first, self._config.train.profiled.stop)
        text = compiled.as_text() or ""
        program, module = read_program(text), text.split(",", 1)[0].removeprefix("HloModule ")
        trace = self._directory / PROFILE_TRACE
        try:
            timeline = read_timeline(trace, module, containers(program))
        except InputError as error:
            print(f"No table of the profile: {error}")
            return
        found = step_times(timeline, program, self._config.model, tokens, steps, _peaks())
        print(table(found))
        opened = f"Perfetto and XProf open {PROFILE_TRACE}/"
        print(f"{PROFILE_PAGE} in the run's directory draws it; {opened}.")
        with replacing(self._directory / PROFILE_PAGE) as file:
            file.write(page(found).encode())


def _peaks() -> Peaks:
    flops, count = peak_flops(), jax.device_count()
    return Peaks(flops.flops / count, peak_bandwidth() / count, flops.source)
