"""The parts of the benchmark; the entry is ``benchmarks/bench.py``."""
