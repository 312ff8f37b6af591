"""The Celery application of the chaos test's workers, which knows nothing of Wove."""

import os

from celery import Celery

app = Celery("chaos", set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    task_acks_late=os.environ["CHAOS_ACKS_LATE"] == "1",
    broker_transport_options={"visibility_timeout": int(os.environ["CHAOS_VISIBILITY"])},
)
