"""The Celery app of hot_path.py."""

from __future__ import annotations

import os

from celery import Celery
from hot_path_tasks import noop

app = Celery("hot_path", broker=os.environ["HOT_PATH_REDIS"], backend=os.environ["HOT_PATH_REDIS"])
celery_noop = app.task(noop, name="hot_path.noop")
