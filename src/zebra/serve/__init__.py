"""`zebra serve`: an OpenAI-compatible server of one checkpoint on one machine.

client ─► guard (limits, token) ─► app, requests, jobs (JSON body to tokens) ─► engine (a queue, one thread)
client ◄─ answers (API objects or server-sent events) ◄─ answering (KV caches, tokens to pieces) ◄──┘
"""
