"""What jax compiles, so that a run can show that a warm step compiles nothing, and apart from its steps how long the rest took."""

import jax


class Compilations:
    """Programs compiled (or loaded from the persistent cache) in this process since the last `take`."""

    def __init__(self):
        self._count, self._seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._count, self._seconds = self._count + 1, self._seconds + seconds

    def take(self) -> int:
        count, self._count, self._seconds = self._count, 0, 0.0
        return count

    def metrics(self) -> dict[str, float]:
        """What `take` gives, with the seconds it took."""
        seconds = self._seconds
        return {"perf/compilations": self.take(), "timing_s/compile": seconds}
