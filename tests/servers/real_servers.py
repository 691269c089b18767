"""Start real servers on a free port of 127.0.0.1, wait until they answer, end them by pid."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
MAX_LOGPROBS = 64
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # All of its inner sockets on the loopback.
    "VLLM_HOST_IP": "127.0.0.1",
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
LLAMACPP = """
import os, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.model_alias, p.hostnames, p.port = sys.argv[1], {"smollm2"}, ["127.0.0.1"], int(sys.argv[2])
p.n_ctx, p.n_parallel, p.n_gpu_layers = 2048, 2, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(p)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def vllm_server(model, log):
    """The base URL of a real vLLM that serves `model` as smollm2, in float32."""
    port = free_port()
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--max-logprobs", str(MAX_LOGPROBS)]
    command += ["--no-enable-prefix-caching"]
    with running(command, log, f"http://127.0.0.1:{port}/health", VLLM_ENVIRONMENT):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def llamacpp_server(gguf, log):
    """The base URL of a real llama.cpp that serves `gguf` as smollm2."""
    port = free_port()
    with running([sys.executable, "-c", LLAMACPP, gguf, str(port)], log, f"http://127.0.0.1:{port}/health", {}):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def running(command, log, health, environment, seconds=300):
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while not _healthy(health):
            assert process.poll() is None, f"the server ended: {Path(log).read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no answer in {seconds} s: {Path(log).read_text()[-2000:]}"
            time.sleep(0.5)
        yield process
    finally:
        process.stdin.close()
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
