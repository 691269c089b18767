"""Between client and server on a real socket: forwards each request, and spoils the answers that its plan names."""

import json
import socket
import struct
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CLOSING = ("reset", "close_early")


class FaultProxy(ThreadingHTTPServer):
    """`plan(number, body)` names the fault of the number-th completion, or None. `faults` counts what was spoilt."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream, plan):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.plan = upstream, plan
        self.seen, self.faults = 0, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(*self._forward(None))

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        number, self.server.seen = self.server.seen, self.server.seen + 1
        fault = self.server.plan(number, json.loads(data))
        if fault is None:
            return self._send(*self._forward(data))
        self.server.faults.append(fault)
        if fault == "429":
            return self._send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.05"})
        if fault == "500":
            return self._send(500, b'{"error": {"message": "oops"}}')
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return None
        status, answer = self._forward(data)
        if fault == "delay":
            time.sleep(2.0)
        if fault == "truncated_json":
            return self._send(status, answer[: len(answer) // 2])
        if fault == "close_early":
            self._head(status, len(answer))
            self.wfile.write(answer[: len(answer) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        return self._send(status, json.dumps(spoilt(json.loads(answer), fault)).encode())

    def _forward(self, data):
        request = urllib.request.Request(self.server.upstream + self.path.removeprefix("/v1"), data)
        for name in ("Authorization", "Content-Type"):
            if self.headers.get(name):
                request.add_header(name, self.headers[name])
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _head(self, status, length, headers=None):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(length),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status, data, headers=None):
        try:
            self._head(status, len(data), headers)
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client gave up waiting

    def log_message(self, *args):
        pass


def spoilt(tree, fault):
    """A 200 whose content is wrong."""
    if fault == "other_model":
        return {**tree, "model": "somebody-else"}
    if fault == "fewer_choices":
        return {**tree, "choices": tree["choices"][1:]}
    for choice in tree["choices"]:
        for row in [*(choice.get("prompt_logprobs") or [])][1:]:
            first = next(iter(row))
            if fault == "fewer_than_k":
                for key in list(row)[2:]:
                    del row[key]
            elif fault == "duplicate_id":
                row[f"0{next(reversed(row))}"] = {"logprob": -9.0}
            elif fault == "nan":
                row[first]["logprob"] = float("nan")
            elif fault == "positive":
                row[first]["logprob"] = 3.0
            elif fault == "shifted":
                row.pop(first)
                row["0"] = {"logprob": -1.0}
    return tree
