"""The time at which a run stops by itself: a time of day, or after some hours."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from ..errors import CascadeError, quoted
from .settings import TrainSettings


def stop_time(settings: TrainSettings, now: datetime) -> datetime | None:
    """The time at which a run that begins now stops; None: at its last step. Raises CascadeError."""
    times = []
    if settings.stop_after is not None:
        times.append(now + timedelta(hours=settings.stop_after))
    if settings.stop_at is not None:
        times.append(_at(settings.stop_at, now))
    return min(times, default=None)


def _at(text: str, now: datetime) -> datetime:
    if len(text) <= 5:  # a time of day: its next occurrence
        hour, minute = map(int, text.split(":"))
        today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return today if today > now else today + timedelta(days=1)
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is not None:
        moment = moment.astimezone().replace(tzinfo=None)
    if moment <= now:
        raise CascadeError(
            f"train.stop_at is {quoted(text)}, which is past; give a time to come, such as 07:30."
        )
    return moment


def stopping(stop: Callable[[], bool], at: datetime | None) -> Callable[[], bool]:
    """True when `stop` is, or when the time has come."""
    if at is None:
        return stop
    end = time.monotonic() + (at - datetime.now()).total_seconds()
    return lambda: stop() or time.monotonic() >= end
