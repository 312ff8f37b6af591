"""Celery and RQ without any Wove, used as well as their users can."""

import time

from bench_tasks import nap, noop
from drive import Clock, percentiles

WAIT = 60


class Raw:
    """What both have in common: submit all, then fetch all."""

    async def open(self):
        """Nothing to start."""

    async def throughput(self, count):
        """Submit no-ops, then wait for each."""
        return self.all_of("noop", count)

    async def naps(self, count):
        """The same with tasks of 100 ms."""
        return self.all_of("nap", count)

    async def latency(self, count):
        """One call after another."""
        taken = []
        for number in range(count):
            begun = time.perf_counter()
            self.check([self.fetch(self.submit("noop", number))], [number])
            taken.append(time.perf_counter() - begun)
        return percentiles(taken)

    async def stall(self, count):
        """How long the submissions hold their thread, all together: in a coroutine they would hold the loop."""
        with Clock() as clock:
            jobs = [self.submit("noop", number) for number in range(count)]
        self.check([self.fetch(job) for job in jobs], range(count))
        return {"stall": 1000 * clock.figures["seconds"]}

    def all_of(self, name, count):
        with Clock() as clock:
            jobs = [self.submit(name, number) for number in range(count)]
            values = [self.fetch(job) for job in jobs]
        self.check(values, range(count))
        return clock.figures

    @staticmethod
    def check(values, expected):
        if list(values) != list(expected):
            raise RuntimeError("the results are not those of the calls")


class Celery(Raw):
    """``delay`` and ``get``; Celery is told of results by Redis (publish, subscribe)."""

    def __init__(self, options):
        import bench_raw_celery

        self.tasks = {"noop": bench_raw_celery.noop, "nap": bench_raw_celery.nap}

    def submit(self, name, number):
        return self.tasks[name].delay(number)

    def fetch(self, job):
        return job.get(timeout=WAIT)


class Rq(Raw):
    """``enqueue``, and ``latest_result(timeout)``: a blocking XREAD, the only wait of RQ's without polling."""

    def __init__(self, options):
        from redis import Redis
        from rq import Queue

        self.queue = Queue(connection=Redis.from_url(options["redis_url"]))
        self.functions = {"noop": noop, "nap": nap}

    def submit(self, name, number):
        return self.queue.enqueue(self.functions[name], number)

    def fetch(self, job):
        return job.latest_result(timeout=WAIT).return_value
