"""An RQ worker that says in its log what it has imported before it forks."""

from __future__ import annotations

import sys
from typing import Any

from rq.worker import Worker


class WatchedWorker(Worker):
    """RQ's own worker otherwise."""

    def fork_work_horse(self, job: Any, queue: Any) -> None:
        """Fork for a job."""
        self.log.info("it forks with %s", "Wove" if "wove.worker.rq" in sys.modules else "RQ alone")
        super().fork_work_horse(job, queue)
