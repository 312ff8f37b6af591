"""A user's Celery project, which knows nothing of Wove."""

import os

from celery import Celery

_serializer = os.environ.get("WOVE_TESTS_SERIALIZER", "json")

app = Celery("project", broker=os.environ.get("WOVE_DEMO_BROKER_URL"))
app.conf.update(
    task_serializer=_serializer,
    accept_content=[_serializer],
    broker_connection_retry_on_startup=True,
)


def __getattr__(name: str) -> Celery:
    # Made when first asked for: the broker's address is not known when tests are collected.
    if name == "app_from_environment":
        return Celery("project", broker=os.environ["WOVE_TESTS_BROKER_URL"], set_as_current=False)
    raise AttributeError(name)
