"""The aiohttp server that workers report to; imports as ``wove.callback_server``."""
