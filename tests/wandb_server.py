"""A wandb server on this machine that takes a run: enough of its protocol for one, and no more."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

PROJECT = {"id": "p", "name": "cifar_accel", "entity": {"id": "e", "name": "ann"}}
RUN = {"id": "r", "name": "a", "displayName": "a", "config": None, "project": PROJECT}


@contextmanager
def wandb_server() -> Iterator[SimpleNamespace]:
    """A server, as what it was told: `variables` by GraphQL operation, and each `files` stream.

    `address` is its own. With `stops` set it says, once there is a row, that somebody
    has pressed Stop.
    """
    told = SimpleNamespace(variables={}, files={}, stops=False)
    told.complete = threading.Event()

    def answer(query: dict) -> dict:
        operation = re.search(r"(?:query|mutation) (\w+)", query["query"])[1]
        told.variables.setdefault(operation, []).append(query.get("variables"))
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": RUN, "inserted": True}}
        if operation == "CreateRunFiles":
            names = query["variables"]["files"]
            urls = [{"name": name, "uploadUrl": f"{told.address}/put"} for name in names]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": urls}}
        return {"viewer": {"id": "v", "entity": "ann"}, "serverInfo": {}, "model": None}

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answered = {}
            if self.path == "/graphql":
                answered = {"data": answer(json.loads(body))}
            if self.path.endswith("/file_stream"):
                stream = json.loads(body)
                for name, piece in (stream.get("files") or {}).items():
                    told.files.setdefault(name, []).extend(map(json.loads, piece["content"]))
                answered = {"stopped": told.stops and "wandb-history.jsonl" in told.files}
                if stream.get("complete"):
                    told.exit_code = stream["exitcode"]
                    told.complete.set()
            text = json.dumps(answered).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST

        def log_message(self, *args):
            """Say nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    told.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield told
    finally:
        server.shutdown()
