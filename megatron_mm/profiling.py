"""A window of iterations under torch's profiler."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

from megatron_mm.config.schema import ProfileConfig


class ProfileWindow:
    """Records iterations profile.start .. profile.start + profile.steps - 1 of a rank that profile.ranks names, and
    writes them to `folder` as rank_<n>.json.gz, for chrome://tracing or perfetto.dev."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int):
        self._config, self._path = config, folder / f"rank_{rank}.json.gz"
        self._wanted = config.start is not None and rank in config.ranks
        self._profiler: profile | None = None

    def before(self, iteration: int) -> None:
        """`iteration` is about to begin."""
        if self._wanted and iteration == self._config.start:
            activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def after(self, iteration: int) -> str | None:
        """`iteration` is over. Returns where its trace lies, if it was the last of the window."""
        if self._profiler is None or iteration < (self._config.start or 0) + self._config.steps - 1:
            return None
        return self.close()

    def close(self) -> str | None:
        """Ends a window that is open, be it before its time, and writes it."""
        if self._profiler is None:
            return None
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        return str(self._path)
