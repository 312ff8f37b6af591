"""The Celery application of the chaos test's workers, which knows nothing of Wove."""

import os

from celery import Celery

app = Celery("chaos", set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={"visibility_timeout": int(os.environ["CHAOS_VISIBILITY"])},
)
