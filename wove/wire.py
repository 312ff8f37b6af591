"""How values, callables and messages become bytes.

A *message* is an envelope (small, plain data) followed by attachments (raw bytes)::

    u32 length of the envelope | envelope (msgpack map) | attachment 0 | attachment 1 | ...

The envelope lists the attachments' sizes under ``"sizes"``. Users' values stand in
attachments, so that the envelope can be decoded under tight limits and a large array is
never copied into another buffer. A value is described by ``[codec, first, count]``: its
codec, the index of its first attachment and how many it has. Codecs:

``data``    plain msgpack
``tagged``  msgpack in which ``{"__wove__": tag, "v": ...}`` stands for a tuple, a set, ...
``pickle``  a pickle (protocol 5), followed by its out-of-band buffers

A value travels as the first of these that gives it back exactly. JSON peers write values
inline, in the ``tagged`` form.
"""

from __future__ import annotations

import importlib
import json
import pickle
import struct
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.buffers import copied
from wove.decode_limits import Bounds
from wove.errors import EncodeError, MissingDispatchFeatureError, ProtocolError, raised_by_code, safe_text
from wove.plain_data import (
    MAX_MAPPING,
    MAX_SEQUENCE,
    OTHER,
    PLAIN,
    shape_of,
    to_tagged,
    type_name,
    untag,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

try:
    import msgpack
except ImportError:  # the base install has no dependencies
    msgpack = None

#: Envelope limits: a body of hostile nesting or claimed lengths is refused in microseconds.
MAX_ENVELOPE = 4 * 1024 * 1024
MAX_ENTRIES = 64
#: Longest JSON message, in bytes: Python's decoder knows no limits, and builds up to thirty times as much.
MAX_JSON = 16 * 1024 * 1024
#: Buffers from this size, in bytes, travel out of band: below it a copy is cheaper.
OUT_OF_BAND_FROM = 64 * 1024
#: Where the largest of them begins is a multiple of this.
ALIGNMENT = 64
#: Messages whose attachments have up to so many bytes are one buffer: one write, one signature.
JOINED_UP_TO = 8 * 1024

_HEAD = struct.Struct(">I")
Descriptor = list[Any]


def require_msgpack() -> None:
    """Raise MissingDispatchFeatureError, with the command that mends it, without msgpack."""
    if msgpack is None:
        raise MissingDispatchFeatureError(
            'Sending work outside this process needs msgpack: pip install "wove[dispatch]"'
        )


# --- values -----------------------------------------------------------------


def encode_value(value: Any, attachments: list[Buffer]) -> Descriptor:
    """Append ``value`` to ``attachments`` and return its descriptor.

    Raises:
        EncodeError: no codec can carry the value; the message names its type.
    """
    require_msgpack()
    first = len(attachments)
    shape = shape_of(value)
    if shape != OTHER:
        try:
            codec, data = pack_plain(value, shape)
        except (ValueError, OverflowError, TypeError, RecursionError):
            pass  # lone surrogates, for one; a pickle carries them
        else:
            attachments.append(data)
            return [codec, first, 1]
    try:
        attachments.extend(_pickle(value, MAX_ENTRIES - len(attachments) - 2))
    except MissingDispatchFeatureError:
        raise
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        raise EncodeError(
            f"a value of type {type_name(value)} cannot be sent: {type(exc).__name__}: {safe_text(exc, 400)}"
        ) from exc
    return ["pickle", first, len(attachments) - first]


def encode_light(value: Any, attachments: list[Buffer]) -> Descriptor:
    """Encode lists and dictionaries of scalars that are known to be plain; see :func:`encode_value`."""
    require_msgpack()
    try:
        data = msgpack.packb(value, use_bin_type=True)
    except (ValueError, OverflowError, TypeError):
        return encode_value(value, attachments)  # a lone surrogate, or an integer beyond 64 bits
    attachments.append(data)
    return ["data", len(attachments) - 1, 1]


def decode_value(descriptor: Any, attachments: Sequence[memoryview]) -> Any:
    """Rebuild a value. Only for bytes whose signature was verified: a pickle runs code.

    Raises:
        ProtocolError: the descriptor or the bytes are malformed.
        Exception: whatever unpickling the value raises, such as ImportError.
    """
    codec, parts = _attached(descriptor, attachments)
    if codec == "pickle":
        buffers = [part if not part.readonly else copied(part) for part in parts[1:]]
        return pickle.loads(parts[0], buffers=buffers)
    if codec not in ("data", "tagged") or len(parts) != 1:
        raise ProtocolError(f"unknown value codec {safe_text(codec, 40)!r}")
    return _unpack_plain(parts[0], tagged=codec == "tagged")


def _attached(descriptor: Any, attachments: Sequence[memoryview]) -> tuple[Any, list[memoryview]]:
    if type(descriptor) is not list or len(descriptor) != 3:
        raise ProtocolError("a value's descriptor is [codec, first, count]")
    codec, first, count = descriptor
    if type(first) is not int or type(count) is not int or first < 0 or count < 1:
        raise ProtocolError("a value's descriptor is [codec, first, count]")
    if first + count > len(attachments):
        raise ProtocolError("a value's attachment is missing")
    return codec, list(attachments[first : first + count])


def pack_plain(value: Any, shape: int) -> tuple[str, bytes]:
    """Return codec and bytes of a value of shape PLAIN or TAGGED.

    Raises:
        ValueError, OverflowError, TypeError, RecursionError: msgpack cannot write it: lone surrogates, for one.
    """
    require_msgpack()
    if shape == PLAIN:
        try:
            return "data", msgpack.packb(value, use_bin_type=True)
        except OverflowError:
            pass  # an integer beyond 64 bits: tagged
    return "tagged", msgpack.packb(to_tagged(value), use_bin_type=True)


def _unpack_plain(data: Buffer, *, tagged: bool) -> Any:
    bounds = Bounds(untag if tagged else None)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            object_hook=bounds.mapping,
            list_hook=bounds.sequence,
            max_array_len=MAX_SEQUENCE,
            max_map_len=MAX_MAPPING,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except ProtocolError:
        raise
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        raise ProtocolError(f"malformed data: {type(exc).__name__}: {safe_text(exc, 200)}") from exc


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ProtocolError(f"msgpack extension type {code} is not part of this protocol")


def _pickle(value: Any, max_buffers: int) -> list[Buffer]:
    buffers: list[Buffer] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if view.nbytes < OUT_OF_BAND_FROM or len(buffers) >= max_buffers:
            return True
        buffers.append(view)
        return False

    if not _by_value_modules():
        try:
            data = pickle.dumps(value, 5, buffer_callback=keep_in_band)
        except Exception as exc:
            if not raised_by_code(exc):
                raise
            buffers.clear()
        else:
            # What lives in __main__ is not importable on the other side.
            if b"__main__" not in data and b"__mp_main__" not in data:
                return [data, *buffers]
            buffers.clear()
    data = _cloudpickle().dumps(value, protocol=5, buffer_callback=keep_in_band)
    return [data, *buffers]


def _by_value_modules() -> bool:
    # Respect cloudpickle.register_pickle_by_value without importing cloudpickle.
    # Another thread may be in the middle of importing it.
    registered = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", None)
    return registered is not None and bool(registered())


def _cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError:
        raise MissingDispatchFeatureError(
            'Sending functions and objects by value needs cloudpickle: pip install "wove[dispatch]"'
        ) from None
    return cloudpickle


# --- callables --------------------------------------------------------------


def callable_name(func: Any) -> str:
    """Return the dotted name that logs and dashboards show for ``func``."""
    while isinstance(func, partial):
        func = func.func
    named = func if hasattr(func, "__qualname__") else type(func)
    # Methods of built-in types name no module.
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def importable_reference(func: Any, *, only_names: bool = False) -> str | None:
    """Return ``"module:qualname"`` when importing that gives ``func`` itself, else None.

    Args:
        func: the callable.
        only_names: that some modules are to travel by value counts for nothing.
    """
    module, qualname = getattr(func, "__module__", None), getattr(func, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or "<" in qualname:
        return None
    if module in ("__main__", "__mp_main__") or (not only_names and _by_value_modules()):
        return None
    found: Any = sys.modules.get(module)
    try:
        for name in qualname.split("."):
            found = getattr(found, name)
    except AttributeError:
        return None
    return f"{module}:{qualname}" if found is func else None


def encode_callable(func: Any, attachments: list[Buffer]) -> str | Descriptor:
    """Describe ``func``: by name where it can be imported, by value otherwise."""
    return importable_reference(func) or encode_value(func, attachments)


def decode_callable(described: Any, attachments: Sequence[memoryview]) -> Any:
    """Return the callable that :func:`encode_callable` described (verified bytes only).

    Raises:
        ImportError, AttributeError: a name that cannot be resolved here.
        ProtocolError: the description is malformed.
    """
    if type(described) is not str:
        return decode_value(described, attachments)
    module, _, qualname = described.partition(":")
    if not module or not qualname:
        raise ProtocolError("a callable's name is module:qualname")
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


# --- messages ---------------------------------------------------------------


def pack_message(envelope: Mapping[str, Any], attachments: Sequence[Buffer]) -> list[Buffer]:
    """Return the message as a list of buffers, to be sent (and signed) one after another.

    The largest attachment, where it may be an array's memory, begins at a multiple of ALIGNMENT: the array is
    made from it as it lies there, and computing with one that begins anywhere is slow, or refused.
    """
    require_msgpack()
    sizes = [len(part) if type(part) is bytes else memoryview(part).nbytes for part in attachments]
    fields = {**envelope, "sizes": sizes}
    head = msgpack.packb(fields, use_bin_type=True)
    if sum(sizes) <= JOINED_UP_TO:
        return [b"".join((_HEAD.pack(len(head)), head, *attachments))]
    if max(sizes) >= OUT_OF_BAND_FROM:
        largest = sizes.index(max(sizes))
        # As short as it is, this is as long with any content: two bytes and those in it.
        at = _HEAD.size + len(msgpack.packb({**fields, "pad": b""})) + sum(sizes[:largest])
        head = msgpack.packb({**fields, "pad": bytes(-at % ALIGNMENT)}, use_bin_type=True)
    return [_HEAD.pack(len(head)) + head, *attachments]


_PARKED = b"wove/1 parked"
#: Under which name a backend keeps an outcome that could not be delivered, and, where it needs an
#: id of its own there, what that has after the job's id.
PARKED = "wove_outcome"
PARKED_SUFFIX = "-outcome"


def park(kid: str, tag: bytes, body: Sequence[Buffer]) -> bytes:
    """Join a signed outcome into one blob, for a backend to keep until it is fetched."""
    return b"\n".join((_PARKED, kid.encode(), tag.hex().encode(), b"".join(body)))


def unpark(blob: bytes) -> tuple[str, bytes, bytes]:
    """Split what :func:`park` made into key id, signature and body; nothing is verified yet.

    Raises:
        ProtocolError: it is not such a blob.
    """
    try:
        mark, kid, tag, body = bytes(blob).split(b"\n", 3)
        if mark != _PARKED:
            raise ValueError("another form")
        return kid.decode("ascii"), bytes.fromhex(tag.decode("ascii")), body
    except ValueError:
        raise ProtocolError("not a parked outcome") from None


def unpack_message(body: Buffer) -> tuple[dict[str, Any], list[memoryview]]:
    """Split a message into its envelope and its attachments.

    Raises:
        ProtocolError: the bytes are not a message.
    """
    require_msgpack()
    view = memoryview(body)
    if view.nbytes < _HEAD.size:
        raise ProtocolError("a message is cut short")
    (length,) = _HEAD.unpack_from(view)
    at = _HEAD.size + length
    if length > MAX_ENVELOPE or at > view.nbytes:
        raise ProtocolError("a message's envelope is longer than the message, or than allowed")
    envelope = _unpack_envelope(view[_HEAD.size : at])
    sizes = envelope.pop("sizes", None)
    envelope.pop("pad", None)
    if type(sizes) is not list:
        raise ProtocolError("a message's sizes are not whole numbers")
    parts = []
    for size in sizes:
        if type(size) is not int or size < 0:
            raise ProtocolError("a message's sizes are not whole numbers")
        parts.append(view[at : at + size])
        at += size
    if at != view.nbytes:
        raise ProtocolError("a message's attachments do not fill it")
    return envelope, parts


def _unpack_envelope(data: memoryview) -> dict[str, Any]:
    try:
        envelope = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_str_len=65_536,
            max_bin_len=65_536,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except Exception as exc:
        if not raised_by_code(exc):
            raise
        raise ProtocolError(f"malformed envelope: {type(exc).__name__}: {safe_text(exc, 200)}") from exc
    if type(envelope) is not dict:
        raise ProtocolError("an envelope is a mapping")
    return envelope


def unpack_json(body: Buffer) -> dict[str, Any]:
    """Decode a JSON message: one mapping, its values inline in the tagged form.

    Raises:
        ProtocolError: it is no such message, or longer than MAX_JSON.
    """
    size = memoryview(body).nbytes
    if size > MAX_JSON:
        raise ProtocolError(
            f"a JSON message of {size} bytes, and {MAX_JSON} are taken: msgpack messages may be larger"
        )
    try:
        message = json.loads(bytes(body))
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"malformed JSON: {safe_text(exc, 200)}") from exc
    if type(message) is not dict:
        raise ProtocolError("a JSON message is a mapping")
    return message
