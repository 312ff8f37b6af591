"""Coverage-guided fuzzing of what decodes verified bytes, where Atheris installs: pip install atheris, then

    PYTHONPATH=tests/support python tests/fuzz/atheris_decoders.py -max_total_time=600

Options are libFuzzer's. No test: pytest does not collect it.
"""

from __future__ import annotations

import contextlib
import os
import sys

import atheris

os.environ.setdefault("WOVE_SECRET", "a-secret-for-fuzzing-of-some-length")

with atheris.instrument_imports(include=["wove"]):
    from wove import wire
    from wove.callback_server.decoding import decode_batch
    from wove.errors import PayloadRejectedError, ProtocolError
    from wove.worker.assignment import Assignment

RUN_ID = "f" * 32


def one_input(data: bytes) -> None:
    """Hand one input to one of the decoders; anything but their own errors is a finding."""
    if not data:
        return
    kind, body = data[0] % 6, data[1:]
    with contextlib.suppress(ProtocolError, PayloadRejectedError):
        if kind == 0:
            decode_batch(bytearray(body), "application/msgpack", RUN_ID, final=True, plain=True)
        elif kind == 1:
            decode_batch(bytearray(body), "application/json", RUN_ID, final=False, plain=True)
        elif kind == 2:
            wire.decode_value(["tagged", 0, 1], [memoryview(body)])
        elif kind == 3:
            wire.unpack_message(body)
        elif kind == 4:
            wire.unpark(body)
        else:
            Assignment(body)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
