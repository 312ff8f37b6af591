"""Thousands of runs through Celery and RQ while things die, and a checker that counts what became of them.

``python -m wove_tests.chaos`` is ``make chaos``, ``python -m wove_tests.chaos.kills`` is ``make kills``.
"""
