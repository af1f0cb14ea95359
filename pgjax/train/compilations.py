"""Counts what jax compiles, so that a run can show that a warm step compiles nothing."""

import jax


class Compilations:
    """Programs compiled (or loaded from the persistent cache) in this process since the last `take`."""

    def __init__(self):
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, _seconds: float, **_) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def take(self) -> int:
        count, self._count = self._count, 0
        return count
