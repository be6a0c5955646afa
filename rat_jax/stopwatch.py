"""What a program spends its time on, in one line."""

import sys
import time

_BEGAN_SECS = time.monotonic()  # before the imports that take seconds, which are the first lap


class Stopwatch:
    """Seconds from the import of this module on, lap by lap, and those that went to compiling, added up over threads.

    For one program in a process: it listens to what JAX says of its compilations until `report`.
    """

    def __init__(self):
        from jax import monitoring  # a part of what the first lap measures

        self._monitoring = monitoring
        self._since = _BEGAN_SECS
        self._laps: list[str] = []
        self._num_tokens = 0
        self._compile_secs, self._num_programs, self._num_read = 0.0, 0, 0
        monitoring.register_event_duration_secs_listener(self._add_duration)
        monitoring.register_event_listener(self._add_event)
        self.lap("imports")

    def lap(self, name: str) -> None:
        """What was done since the last lap, or the start, has this name."""
        self._laps.append(f"{name} {self._lap_secs():.2f} s")

    def add_tokens(self, count: int) -> None:
        """So many tokens were made; a lap ends with the first of all."""
        if self._num_tokens == 0 and count > 0:
            self.lap("first token")
        self._num_tokens += count

    def report(self) -> None:
        """Prints the laps to standard error; where tokens were made, what was done since the last lap is that."""
        if self._num_tokens > 0:
            secs = self._lap_secs()
            self._laps.append(f"{self._num_tokens:,} tokens in {secs:.2f} s ({self._num_tokens / secs:,.0f} a second)")
        self._monitoring.unregister_event_duration_listener(self._add_duration)
        self._monitoring.unregister_event_listener(self._add_event)
        read = f", {self._num_read} of them from the compilation cache" if self._num_read else ""
        print(
            f"times: {', '.join(self._laps)}; compiling took {self._compile_secs:.2f} s, some of it side by side "
            f"({self._num_programs} programs{read})",
            file=sys.stderr,
        )

    def _lap_secs(self) -> float:
        now = time.monotonic()
        secs, self._since = now - self._since, now
        return secs

    def _add_duration(self, event: str, duration_secs: float, **details: object) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, and compiling or reading what is compiled
            self._compile_secs += duration_secs
            self._num_programs += event.endswith("/backend_compile_duration")

    def _add_event(self, event: str, **details: object) -> None:
        self._num_read += event == "/jax/compilation_cache/cache_hits"
