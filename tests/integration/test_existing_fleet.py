"""examples/existing_celery_fleet, as its README runs it: a Celery worker, a web server, and HTTP."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from celery import Celery

from wove.demo.processes import CeleryWorker, ManagedProcess, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from wove_tests.fleets import Fleets

pytestmark = pytest.mark.redis

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "existing_celery_fleet"

# A Redis database that no fleet of the contract tests uses.
DATABASE = 10


@pytest.fixture(scope="module")
def broker_url(fleets: Fleets) -> str:
    return fleets.redis_url(DATABASE)


@pytest.fixture(scope="module")
def worker(broker_url: str) -> Iterator[CeleryWorker]:
    with CeleryWorker(broker_url, app="shop", cwd=EXAMPLE) as running:
        yield running


@pytest.fixture(scope="module")
def service_url(broker_url: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "api:app", "--port", str(port)]
    service = ManagedProcess(command, name="uvicorn", cwd=EXAMPLE, env={"SHOP_BROKER_URL": broker_url})
    with service:
        service.wait_for_log("Uvicorn running on")
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def client(service_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(service_url, timeout=timeout) as session:
        yield session


async def test_a_request_awaits_the_fleet(client: aiohttp.ClientSession, worker: CeleryWorker) -> None:
    basket = {"articles": {"teapot": 1, "cup": 4}, "country": "DE"}
    async with client.post("/quotes", json=basket) as answer:
        assert answer.status == 200
        assert await answer.json() == {"net": "50.00", "vat": "9.50", "total": "59.50"}
    await asyncio.to_thread(worker.wait_for_log, "shop.pricing.quote")


@pytest.mark.usefixtures("worker")
async def test_a_coroutine_function_is_awaited_too(client: aiohttp.ClientSession) -> None:
    async with client.get("/offers/teapot") as answer:
        assert await answer.json() == ["Meissen has teapot", "Limoges has teapot"]


@pytest.mark.usefixtures("worker")
async def test_the_projects_own_exception_becomes_its_http_error(client: aiohttp.ClientSession) -> None:
    async with client.post("/quotes", json={"articles": {"wok": 1}, "country": "DE"}) as answer:
        assert answer.status == 404
        assert await answer.json() == {"detail": "no article 'wok'"}


@pytest.mark.usefixtures("worker")
async def test_what_takes_too_long_becomes_a_gateway_timeout(client: aiohttp.ClientSession) -> None:
    async with client.get("/offers/samovar", params={"patience": 60}) as answer:
        assert answer.status == 504


async def test_a_client_that_leaves_cancels_the_work(
    client: aiohttp.ClientSession, worker: CeleryWorker
) -> None:
    # Were the work not cancelled, it would end by itself before the delivery timeout of four seconds.
    asking = asyncio.ensure_future(client.get("/offers/tureen", params={"patience": 3.5}))
    await asyncio.to_thread(worker.wait_for_log, "asking for tureen")
    asking.cancel()
    await asyncio.to_thread(worker.wait_for_log, "nobody wants tureen any more", 10.0)


async def test_the_tasks_the_fleet_had_before_still_run(worker: CeleryWorker, broker_url: str) -> None:
    with Celery("elsewhere", broker=broker_url) as app:
        app.send_task("shop.tasks.send_receipt", [17, "someone@example.org"])
    await asyncio.to_thread(worker.wait_for_log, "receipt for order 17 sent to someone@example.org")
