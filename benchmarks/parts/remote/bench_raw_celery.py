"""Celery as its users have it: tasks of the project's own, results in Redis."""

import os

import bench_tasks
from celery import Celery

_URL = os.environ["BENCH_REDIS_URL"]

app = Celery("bench", broker=_URL, backend=_URL)
app.conf.broker_connection_retry_on_startup = True


@app.task(name="bench.noop")
def noop(value):
    """Return what came in."""
    return bench_tasks.noop(value)


@app.task(name="bench.nap")
def nap(value):
    """Take 100 ms."""
    return bench_tasks.nap(value)
