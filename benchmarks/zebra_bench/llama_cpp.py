"""What llama.cpp takes to read a text and to write on. A script of an environment with xllamacpp: no zebra, no torch.

    python llama_cpp.py MODEL.gguf TEXT TOKENS NEW_TOKENS

One line of JSON: `engine`, CPU seconds of both (`read`, `write`), `cached` tokens before the second, `kv_bytes` as
llama.cpp's log has them, and the new `text`. One thread, its own defaults besides.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any


def main(model: str, text: str, tokens: int, new_tokens: int) -> None:
    """Run the model, and print what it took."""
    import xllamacpp

    out, log = os.fdopen(os.dup(1), "w"), tempfile.TemporaryFile()  # noqa: SIM115  the process ends with it
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 8192
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = 4
    for cpu in (parameters.cpuparams, parameters.cpuparams_batch):
        cpu.n_threads = 1
    server = xllamacpp.Server(parameters)

    def post(route: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{server.listening_address}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return dict(json.load(response))

    ids = post("tokenize", content=Path(text).read_text(encoding="utf-8")[: 12 * tokens])["tokens"][:tokens]
    greedy = {"prompt": ids, "temperature": 0.0, "ignore_eos": True}
    times = [time.process_time()]
    for new in (1, new_tokens + 1):  # the second request has the text in its cache
        done = post("completions", n_predict=new, **greedy)
        times.append(time.process_time())
    log.seek(0)
    sizes = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", log.read().decode(errors="replace"))
    answer = {
        "engine": f"llama.cpp by xllamacpp {xllamacpp.__version__}",
        "read": times[1] - times[0],
        "write": times[2] - times[1],
        "cached": done["timings"]["cache_n"],
        "kv_bytes": sum(float(size) * 2**20 for size in sizes),
        "text": done["content"],
    }
    print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # the server's threads outlive main


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
