"""A Celery application that has a broker and nothing else.

It stands for the application a team already has: Wove is not mentioned here, it comes in through
``celery worker -I wove.worker.celery``.
"""

import os

from celery import Celery

app = Celery("wove_demo", broker=os.environ.get("WOVE_DEMO_BROKER_URL"))
app.conf.broker_connection_retry_on_startup = True
