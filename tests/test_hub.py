"What is wrong with a hub's model is told in one line, by a hub of one's own that answers as the real one does."
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CONFIG = json.dumps(dict(model_type="llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                         intermediate_size=32)).encode()
ERRORS = dict(gated=(403, "GatedRepo"), absent=(401, "RepoNotFound"), private=(404, "RepoNotFound"), busy=(410, None))

ASK = """
import json, os, sys
from pispiral.model.load import load_model
said = {}
for name in sys.argv[1:]:
    try: load_model(f"somebody/{name}")
    except Exception as e: said[name] = [type(e).__name__, str(e)]
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    "A hub with one model of each kind of fault."
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for k, v in {"Content-Length": len(body), **headers}.items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def do_GET(self):
        name = self.path.split("?")[0].split("somebody/")[1].split("/")[0]
        if name in ERRORS:
            code, kind = ERRORS[name]
            return self.answer(code, b"no", **{"X_Error_Code": kind, "X_Error_Message": "no"} if kind else {})
        if not self.path.endswith("config.json") or "adapter" in self.path:
            if "/resolve/" in self.path: return self.answer(404, X_Error_Code="EntryNotFound")
            about = [] if "/tree/" in self.path else dict(id=f"somebody/{name}", sha="0"*40, siblings=[])
            return self.answer(200, json.dumps(about).encode())
        if "generation" in self.path: return self.answer(404, X_Error_Code="EntryNotFound")
        body = CONFIG[:20] if name == "damaged" else CONFIG
        return self.answer(200, body, X_Repo_Commit="0"*40, ETag=f'"{len(body)}"')

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    "What is said of each model: {name: (class, text)}."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP", "ALL_PROXY", "all_proxy"))}
    env |= dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path_factory.mktemp("hub")),
                NO_PROXY="*", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_ETAG_TIMEOUT="5", HF_HUB_DISABLE_XET="1")
    names = [*ERRORS, "damaged", "bare"]
    done = subprocess.run([sys.executable, "-c", ASK, *names], env=env, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name, words", [
    ("gated", "it is gated: accept its terms at https://huggingface.co/somebody/gated"),
    ("absent", "no such model, or it is private"), ("private", "no such model, or it is private"),
    ("busy", "try again later"), ("damaged", "is no JSON, damaged or cut short"), ("bare", "it has no tokenizer")])
def test_a_hubs_fault_is_named(said, name, words):
    kind, text = said[name]
    assert words in text and "\n" not in text and f"somebody/{name}" in text, text
    assert "not in the cache" not in text
