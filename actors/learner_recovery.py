"""A run that outlives its learners: the gang is started again in place, and goes on from the newest checkpoint."""

from __future__ import annotations

from typing import Any

from raygym.actors.learner_group import GANG, LearnerError
from raygym.actors.session import Session
from raygym.actors.trainer import Trainer
from raygym.config import ConfigError, RunConfig
from raygym.console import RunConsole
from raygym.mirror_upload import CheckpointMirror
from raygym.resume import ResumePoint, rewind_point
from raygym.run_files import RunFiles
from raygym.supervision import GivenUp, Kind


def train_through_losses(
    config: RunConfig,
    session: Session,
    files: RunFiles,
    console: RunConsole,
    resumed: ResumePoint | None,
    mirror: CheckpointMirror | None = None,
) -> dict[str, Any]:
    """Train to the end, with one gang of learners after the other where they are lost.

    To the run's files and rollouts a lost gang is what a killed process is, so each gang has a `Trainer` of its own
    that resumes. Engines and EnvRunners stay.

    Args:
        config: the run's.
        session: started with the rollouts of `resumed`.
        files: of the run.
        console: gets the progress.
        resumed: where the run goes on at first.
        mirror: gets each checkpoint.

    Returns:
        What summary.json holds.

    Raises:
        GivenUp: the gang, or another part, was lost more often than `supervision` allows.
        LearnerStateError, RolloutStopped, WeightsError, AlarmStop, DiskFull, MirrorError: as `Trainer.run`.
    """
    trainer = Trainer(config, session, files, console, resumed, mirror)
    lost: LearnerError | None = None
    while True:
        try:
            if lost is not None:
                point = _restarted(config, session, files, console, trainer, lost)
                trainer = Trainer(config, session, files, console, point, mirror)
            return trainer.run()
        except LearnerError as error:  # also while the gang is started again, or loads its state
            lost = error


def _restarted(
    config: RunConfig, session: Session, files: RunFiles, console: RunConsole, trainer: Trainer, lost: LearnerError
) -> ResumePoint:
    """Start a new gang; where the run goes on with it."""
    session.supervisor.lost(Kind.LEARNER, GANG, str(lost))
    session.end_learners()
    session.rollouts.stop_playing()
    trainer.abandon()
    try:
        point = rewind_point(config, console.line)
    except ConfigError as error:
        raise GivenUp(f"{lost}; the run cannot go on by itself: {error}") from None
    files.rewind(point)
    from_where = f"checkpoint {point.checkpoint.path.name}" if point.checkpoint else "the starting policy"
    session.rollouts.rewind(point.rollouts)  # its process starts beside the learners'
    with console.phase(f"starting the learners again, from {from_where}"):
        session.restart_learners()
    session.supervisor.restarted(Kind.LEARNER, GANG)
    return point
