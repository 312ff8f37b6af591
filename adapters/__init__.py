"""Adapters submit payloads to one kind of backend each; imports as ``wove.adapters``."""
