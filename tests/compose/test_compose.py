"""docker-compose.yml: workers in containers, submitters on the host and in a container."""

from __future__ import annotations

import json
import operator
import platform
from typing import TYPE_CHECKING, Any

import pytest

from wove import ExecutorRuntime

if TYPE_CHECKING:
    from pytest_docker.plugin import Services

    from .conftest import Compose

# Building the image and starting a fleet may take minutes where images have to be pulled.
pytestmark = pytest.mark.timeout(900)

# Passed to `python -c` in a container of the network. Its functions stand in __main__, so they travel by
# value.
SUBMIT_FROM_CONTAINER = """
import asyncio, json, platform
from wove import ExecutorRuntime

HERE = platform.node()
CALLBACK = {"callback_host": "0.0.0.0", "callback_url": "http://{hostname}:{port}", "insecure": True}
ENVIRONMENTS = {
    "celery-redis": {"executor": "celery", "executor_config": {"broker_url": "redis://redis:6379/0"}},
    "celery-rabbitmq": {
        "executor": "celery",
        "executor_config": {"broker_url": "amqp://guest:guest@rabbitmq:5672//"},
    },
    "rq": {"executor": "rq", "executor_config": {"redis_url": "redis://redis:6379/1"}},
}
for definition in ENVIRONMENTS.values():
    definition["executor_config"] |= CALLBACK
    definition["delivery_timeout"] = 60

def elsewhere(caller):
    return caller != platform.node()

async def main():
    async with ExecutorRuntime(ENVIRONMENTS) as runtime:
        answers = await asyncio.gather(*(runtime[name].run(elsewhere, HERE) for name in ENVIRONMENTS))
    print(json.dumps(dict(zip(ENVIRONMENTS, answers))))

asyncio.run(main())
"""

SERVICES = ("celery-redis", "celery-rabbitmq", "rq")


@pytest.fixture
def environments(docker_services: Services) -> dict[str, dict[str, Any]]:
    """The definitions with which this machine submits to the workers in the containers."""
    redis = docker_services.port_for("redis", 6379)
    rabbitmq = docker_services.port_for("rabbitmq", 5672)
    places: dict[str, tuple[str, dict[str, Any]]] = {
        "celery-redis": ("celery", {"broker_url": f"redis://127.0.0.1:{redis}/0"}),
        "celery-rabbitmq": ("celery", {"broker_url": f"amqp://guest:guest@127.0.0.1:{rabbitmq}//"}),
        "rq": ("rq", {"redis_url": f"redis://127.0.0.1:{redis}/1"}),
    }
    callback = {
        "callback_host": "0.0.0.0",
        "callback_url": "http://host.docker.internal:{port}",
        "insecure": True,
    }
    return {
        service: {"executor": executor, "executor_config": {**config, **callback}, "delivery_timeout": 60}
        for service, (executor, config) in places.items()
    }


@pytest.mark.parametrize("service", SERVICES)
async def test_the_host_submits_to_workers_in_containers(
    service: str, environments: dict[str, dict[str, Any]]
) -> None:
    async with ExecutorRuntime({service: environments[service]}) as runtime:
        fleet = runtime[service]
        assert await fleet.run(operator.add, 20, 22) == 42
        assert await fleet.run(platform.node) != platform.node()
        # Too large for the broker: the worker fetches it from this machine.
        assert await fleet.run(len, b"x" * 2_000_000) == 2_000_000
        with pytest.raises(ZeroDivisionError):
            await fleet.run(operator.truediv, 1, 0)


async def test_one_submitter_uses_all_three_fleets_at_once(environments: dict[str, dict[str, Any]]) -> None:
    async with ExecutorRuntime(environments) as runtime:
        for service in SERVICES:
            lengths = [length async for length in runtime[service].map(len, ["", "a", "bc"])]
            assert lengths == [0, 1, 2]


@pytest.mark.usefixtures("docker_services")
def test_a_container_submits_to_workers_in_its_network(compose: Compose) -> None:
    output = compose.run(
        "run", "-T", "--rm", "--no-deps", "celery-redis", "python", "-c", SUBMIT_FROM_CONTAINER, timeout=180
    )
    assert json.loads(output.splitlines()[-1]) == dict.fromkeys(SERVICES, True)
