"""`ephemera doctor --vllm` against a small server that speaks as vLLM does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ephemera.cli import main
from ephemera.doctor_vllm import examine_vllm


class Server(ThreadingHTTPServer):
    switch = uses_adapters = True
    refuses = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.adapters: dict[str, str] = {}
        self.prompts: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def say(self, value, status: int = 200):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.say({"data": [{"id": "base"}]})

    def do_POST(self):
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        there = self.server
        if self.path == "/v1/completions":
            there.prompts.append(fields["prompt"])
            changed = there.uses_adapters and fields["model"] in there.adapters
            self.say({"choices": [{"text": " Oslo" if changed else " Norway", "logprobs": {"token_logprobs": [-1.0]}}]})
        elif not there.switch:
            self.say({"detail": "Not Found"}, 404)
        elif there.refuses:
            self.say({"message": "rank 8 is larger than max_lora_rank 4"}, 400)
        elif self.path == "/v1/load_lora_adapter":
            there.adapters[fields["lora_name"]] = fields["lora_path"]
            self.say(b"Success: LoRA adapter added.")
        else:
            del there.adapters[fields["lora_name"]]
            self.say(b"Success: LoRA adapter removed.")


@pytest.fixture
def server():
    with Server() as there:
        thread = threading.Thread(target=there.serve_forever)
        thread.start()
        yield there
        there.shutdown()
        thread.join()


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "row-00000-abc"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "manifest.json").write_text(json.dumps({"adapters": [{"name": folder.name, "prompt": "Capital?"}]}))
    return folder


def test_a_server_that_uses_the_adapter(server, adapter):
    checks = examine_vllm(server.url + "/v1/", adapter)
    assert [check.fix for check in checks] == [None] * 3
    assert checks[-1].found == "base ' Norway', adapted ' Oslo'"
    assert server.prompts == ["Capital?"] * 2
    assert not server.adapters  # unloaded again


def test_an_adapter_that_changes_nothing_fails(server, adapter):
    server.uses_adapters = False
    checks = examine_vllm(server.url, adapter)
    assert "changes nothing: both say ' Norway'" in checks[-1].found
    assert checks[-1].fix is not None
    assert not server.adapters


def test_the_switch_and_a_refusal(server, adapter):
    server.switch = False
    last = examine_vllm(server.url, adapter)[-1]
    assert last.found == "it is switched off"
    assert last.fix is not None
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in last.fix
    server.switch, server.refuses = True, True
    last = examine_vllm(server.url, adapter)[-1]
    assert "rank 8 is larger than max_lora_rank 4" in last.found
    assert last.fix is not None
    assert "--max-lora-rank of at least 8" in last.fix


def test_no_server_and_bad_input(server, adapter, tmp_path):
    (check,) = examine_vllm("http://127.0.0.1:9", adapter)
    assert check.fix is not None
    with pytest.raises(ValueError, match="allowed is an address"):
        examine_vllm("localhost:8000", adapter)
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        examine_vllm(server.url, tmp_path)


def test_the_command(server, adapter, monkeypatch, capsys):
    common = ["ephemera", "doctor", "--vllm", server.url]
    monkeypatch.setattr("sys.argv", common)
    with pytest.raises(SystemExit):
        main()
    assert "--vllm and --adapter go together" in capsys.readouterr().err
    for uses, code in ((True, 0), (False, 1)):
        server.uses_adapters = uses
        monkeypatch.setattr("sys.argv", [*common, "--adapter", str(adapter)])
        with pytest.raises(SystemExit) as done:
            main()
        assert (done.value.code or 0) == code
    assert "1 of 3 checks failed" in capsys.readouterr().out
