"""Executors: they carry frames between the runtime and the place where tasks run."""
