"""A Celery project whose settings come by the environment: one fleet acknowledges late, another one retries."""

import json
import os

from celery import Celery

VARIABLE = "WOVE_TESTS_CELERY_SETTINGS"

app = Celery("configured", set_as_current=False)
app.conf.update(broker_connection_retry_on_startup=True, **json.loads(os.environ.get(VARIABLE, "{}")))

# What no JSON can say: the settings of a task that retries by itself.
if os.environ.get("WOVE_TESTS_AUTORETRY"):
    app.conf.task_annotations = {
        "wove.run": {
            "autoretry_for": (ConnectionError,),
            "retry_kwargs": {"max_retries": 2, "countdown": 0},
        }
    }
