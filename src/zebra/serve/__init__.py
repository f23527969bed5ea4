"""`zebra serve`: an OpenAI-compatible server of one checkpoint on one machine.

client ─► app (limits, token) ─► requests (a body to tokens) ─► engine (one thread, a queue, cached prefixes)
client ◄─ answers (objects of the API, server-sent events) ◄────────┘
"""
