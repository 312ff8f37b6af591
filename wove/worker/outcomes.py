"""Results and errors as the submitter is to have them, by the rules of its environment and of this worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.errors import is_time_limit, normalize_exception
from wove.wire import encode_value

if TYPE_CHECKING:
    from typing_extensions import Buffer


def encode_result(result: Any, attachments: list[Buffer], *, plain: bool) -> list[Any]:
    """Encode a result; as plain data only where its submitter or this worker wants that.

    Raises:
        EncodeError: it cannot be sent; says why.
    """
    if not plain:
        return encode_value(result, attachments)
    from wove.no_pickle import encode_plain

    return encode_plain(result, attachments, setting='"pickle": False there, or WOVE_ALLOW here')


def encode_error(
    exc: BaseException, *, source: str, plain: bool
) -> tuple[dict[str, Any], list[Any], list[Buffer]]:
    """Return an error's data, the description of the exception itself, and the attachments of that.

    The exception is described by an empty list where that fails: the data is sent in any case.

    Raises:
        Exception: a time limit has struck meanwhile; ``exc`` is no such one.
    """
    attachments: list[Buffer] = []
    error = normalize_exception(exc, source=source)
    try:
        # Not with this module: a forking worker would load it for each job that ends well.
        from wove.remote_errors import encode_exception

        return error, encode_exception(exc, attachments, plain=plain), attachments
    except Exception as failure:
        if is_time_limit(failure) and not is_time_limit(exc):
            raise
        return error, [], []
