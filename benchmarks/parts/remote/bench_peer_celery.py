"""The Celery task that users of Wove 2.0.3 have to define themselves; without a result backend, which it does not need."""

import os

from celery import Celery

from wove.backend import run_backend_payload

app = Celery("bench", broker=os.environ["BENCH_REDIS_URL"])
app.conf.broker_connection_retry_on_startup = True


@app.task(name="wove.run_backend_payload", ignore_result=True)
def run_payload(payload):
    """Run a payload; it reports by itself."""
    run_backend_payload(payload)
