"""A start of a run that has made all its steps: what its end could not send to the mirror is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from raygym.config import RunConfig
from raygym.mirror_store import MirrorStore
from raygym.mirror_upload import mirrored, run_in_mirror, seal_of
from raygym.resume import checkpoint_store
from raygym.run_reading import json_lines
from raygym.watched_call import watched

_IDLE_S = 30.0


def send_left(config: RunConfig, store: MirrorStore, step: int, told: Callable[[str], None]) -> None:
    """Have the mirror hold the newest checkpoint of a run that has ended. Waits as a run's end does.

    Args:
        config: the run's; `checkpoint.mirror` is set.
        store: the mirror.
        step: of that checkpoint, which is whole.
        told: gets lines for a person, from any thread.

    Raises:
        MirrorError: it was not sent, and must have been.
    """
    run = run_in_mirror(config.run_dir, str(config.checkpoint.mirror))
    if run is not None and _has(config, store, run, step):
        return  # without a claim: who goes on with this run elsewhere is not disturbed
    rows = json_lines(config.run_dir / "metrics.jsonl", lambda _: None)
    scores = {row["step"]: row.get(config.checkpoint.best_metric) for row in rows if "step" in row}
    with mirrored(config, store, told) as mirror:
        assert mirror is not None
        mirror.begin()
        mirror.submit(step, {step: float(score) for step, score in scores.items() if isinstance(score, int | float)})


def _has(config: RunConfig, store: MirrorStore, run: str, step: int) -> bool:
    seal = seal_of(checkpoint_store(config).path_of(step))
    try:
        uploads = watched(partial(store.uploads, run), _IDLE_S)
    except Exception:  # of any type, as the store's: sending tries it again, and tells
        return False
    return any((upload.step, upload.seal) == (step, seal) for upload in uploads)
