"""The application that `celery -A shop` finds."""

import os

from celery import Celery

app = Celery(
    "shop", broker=os.environ.get("SHOP_BROKER_URL", "redis://localhost:6379/0"), include=["shop.tasks"]
)
app.conf.update(
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
)
