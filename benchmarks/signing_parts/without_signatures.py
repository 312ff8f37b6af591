"""Loaded by a worker beside Wove: all signatures of its process are the same."""

from wove import security

SAME = bytes(security.TAG_SIZE)

security.mac = lambda key, fields, parts=(): SAME
