"""The names by which the runs of several processes find each other."""

from __future__ import annotations

from wove.adapters.rq_sharing import Ticket
from wove.backend import shared_name
from wove.commands import again_frame, orphan_frame
from wove.policy import DeliveryPolicy
from wove.run_state import Run


def test_a_name_tells_environment_queue_and_key_apart() -> None:
    name = shared_name("reports", "default", "report-7")
    assert name == shared_name("reports", "default", "report-7")
    assert len(name) == len(shared_name("r" * 200, "q" * 200, "k" * 1000)) == len("wove:shared:") + 32
    others = [
        ("report", "sdefault", "report-7"),
        ("reports", "defaultr", "eport-7"),
        ("default", "reports", "report-7"),
        ("reports", "default", "report-8"),
        ("reports", "default", "\udc80"),  # from a file's name, for one
    ]
    assert name not in {shared_name(*parts) for parts in others}


def test_a_ticket_is_told_from_a_jobs_id() -> None:
    ticket = Ticket("a" * 32 + "-2", "b" * 32, shared_name("reports", "default", "7"))
    assert Ticket.read(str(ticket)) == ticket
    for other in (None, "a" * 32, "a" * 32 + "-2", 7, object()):
        assert Ticket.read(other) is None


def test_a_run_that_is_submitted_again_keeps_its_key() -> None:
    frame = {"type": "run_task", "run_id": "a" * 32, "delivery": {"attempt": 1, "key": "7"}}
    run = Run("a" * 32, "app.task", DeliveryPolicy(), 0.0)
    again, orphan = again_frame(frame, run)["delivery"], orphan_frame(frame, run)["delivery"]
    assert (again["attempt"], again["key"], again["repeated"]) == (1, "7", True)
    assert (orphan["attempt"], orphan["key"], orphan["attended"]) == (2, "7", False)
    run.attempt = 2
    assert "repeated" not in again_frame(frame, run)["delivery"]
    assert "repeated" not in orphan
