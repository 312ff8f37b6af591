"""What the shop has always used its fleet for: work that nobody waits for."""

from celery import shared_task
from celery.utils.log import get_task_logger

logger = get_task_logger(__name__)


@shared_task
def send_receipt(order: int, email: str) -> None:
    logger.info("receipt for order %s sent to %s", order, email)
