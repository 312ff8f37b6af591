"""What articles cost today where the shop buys them: slow, because the suppliers are."""

import asyncio
import logging

logger = logging.getLogger(__name__)

# Seconds each supplier takes to answer; sleeping stands for their web services.
SUPPLIERS = {"Meissen": 0.1, "Limoges": 0.2}


async def ask(supplier: str, article: str, patience: float) -> str:
    await asyncio.sleep(SUPPLIERS[supplier] + patience)
    return f"{supplier} has {article}"


async def offers(article: str, patience: float = 0.0) -> list[str]:
    """Ask all suppliers at once; with patience, wait that much longer for better offers."""
    logger.warning("asking for %s", article)
    try:
        return list(await asyncio.gather(*(ask(supplier, article, patience) for supplier in SUPPLIERS)))
    except asyncio.CancelledError:
        logger.warning("nobody wants %s any more", article)
        raise
