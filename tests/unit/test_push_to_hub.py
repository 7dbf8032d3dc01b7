"""`push_to_hub` against a stand-in for the Hub on loopback: what arrives there, and that it loads back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import textwrap
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load

from peft_sparse import RandConfig
from peft_sparse.checkpoints import native
from tests.support.models import llama

REPO = "some-user/sparse-adapter"


class Hub(ThreadingHTTPServer):
    """The few endpoints that creating a repository, uploading to it and downloading from it take.

    Attributes:
        files: content by path in the repository `REPO`.
        stored: content by SHA-256, uploaded by the LFS protocol, before the commit that names it.
        seen: (method, path) of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.seen: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: dict, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def parse(self) -> str:
        path = urlsplit(self.path).path
        self.server.seen.append((self.command, path))
        return path

    def do_POST(self) -> None:
        path, body = self.parse(), self.body()
        if self.headers.get("Authorization") != "Bearer hf_stand_in":
            self.answer_json({"error": "who are you?"}, 401)
        elif path == "/api/repos/create":
            self.answer_json({"url": f"{self.server.url}/{REPO}", "name": REPO})
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif path == f"/api/models/{REPO}/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            self.answer_json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/storage/{entry['oid']}"}}
            self.answer_json({"transfer": "basic", "objects": objects})
        elif path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.answer_json({"commitUrl": f"{self.server.url}/{REPO}/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self.answer_json({"error": "not in this stand-in"}, 404)

    def commit(self, operations: list[dict]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                self.server.files[value["path"]] = b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.stored[value["oid"]]

    def do_PUT(self) -> None:
        oid, body = self.parse().removeprefix("/storage/"), self.body()
        self.server.stored[oid] = body
        self.answer(200 if sha256(body).hexdigest() == oid else 400, b"")

    def do_GET(self) -> None:
        name = self.parse().removeprefix(f"/{REPO}/resolve/main/")
        if name in self.server.files:
            content = self.server.files[name]
            self.answer(200, content, {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": "a" * 40})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server) -> Hub:
    """The stand-in, empty."""
    for content in (server.files, server.stored, server.seen):
        content.clear()
    return server


COMMON = """
    import importlib
    import sys
    import huggingface_hub
    import torch
    # Where the Hub is was read from the environment when the library was imported.
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT

    import peft_sparse
    from peft import PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from peft_sparse import RandConfig

    repo, folder = sys.argv[1:]

    def base():
        torch.manual_seed(0)
        shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()

    def output(model):
        with torch.no_grad():
            return model(torch.arange(10)[None]).logits

    config = RandConfig(density=0.05, init_weights=False, task_type="CAUSAL_LM")
"""


@pytest.fixture(scope="module")
def run(interpreter, server, tmp_path_factory) -> Callable[[Path, str], None]:
    """Run a script with this server as its Hub, and nothing downloaded before."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = tmp_path_factory.mktemp("home")
    environment.update(
        HF_ENDPOINT=server.url,
        HF_HOME=str(home),
        HF_TOKEN="hf_stand_in",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
        OMP_NUM_THREADS="1",
    )

    def run_script(folder: Path, script: str) -> None:
        shutil.rmtree(home, ignore_errors=True)
        interpreter.run(textwrap.dedent(COMMON) + textwrap.dedent(script), REPO, folder, environment=environment)

    return run_script


PEFT = "model.push_to_hub(repo)"
TRANSFORMERS = "own = base(); own.load_adapter(folder + '/saved'); own.push_to_hub(repo)"


@pytest.mark.parametrize("push", [PEFT, TRANSFORMERS], ids=["peft", "transformers"])
def test_push_to_hub_uploads_an_adapter_that_loads_back(hub, run, tmp_path, push):
    run(
        tmp_path,
        f"""
        model = get_peft_model(base(), config).eval()
        model.save_pretrained(folder + "/saved")
        {push}
        loaded = PeftModel.from_pretrained(base(), repo)
        assert torch.equal(output(loaded), output(model))
        assert not torch.equal(output(loaded), output(base()))
        """,
    )
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert set(saved) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert set(hub.files) == set(saved) | ({"generation_config.json"} if push == TRANSFORMERS else set())
    assert hub.files["adapter_model.safetensors"] == saved["adapter_model.safetensors"]
    if push == PEFT:
        assert hub.files["adapter_config.json"] == saved["adapter_config.json"]
    assert ("PUT", f"/storage/{sha256(saved['adapter_model.safetensors']).hexdigest()}") in hub.seen
    counts = json.loads(hub.files["adapter_config.json"])["counts"]
    found = native.verify(load(hub.files["adapter_model.safetensors"]), counts=counts)
    assert {name: delta.count for name, delta in found.items()} == counts
    card = ModelCard(hub.files["README.md"].decode())
    lines = card.text.strip().splitlines()
    assert lines[2].startswith("import peft_sparse ")
    assert lines[3] == "from peft import PeftModel"
    assert f"{sum(counts.values()):,} in {len(counts)} tensors" in card.text
    assert {"peft-sparse", "sparse-fine-tuning", "rand"} <= set(card.data.tags)
    assert card.data.library_name == "peft"


def test_pushing_again_keeps_the_words_on_the_hub_and_refuses_a_damaged_download(hub, run, tmp_path):
    hub.files["README.md"] = b"---\nlicense: mit\ntags:\n- mine\n---\n\n# Words on the Hub\n"
    run(
        tmp_path,
        """
        model = get_peft_model(base(), config, adapter_name="german").eval()
        model.push_to_hub(repo)
        loaded = PeftModel.from_pretrained(base(), repo, subfolder="german")
        assert torch.equal(output(loaded), output(model))
        native = base()
        native.load_adapter(repo, adapter_kwargs={"subfolder": "german"})
        assert torch.equal(output(native), output(model))
        """,
    )
    assert set(hub.files) == {"README.md"} | {
        f"german/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")
    }
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit"
    assert {"mine", "peft-sparse"} <= set(card.data.tags)
    assert card.text.strip().splitlines()[2].startswith("import peft_sparse ")
    assert 'subfolder="german"' in card.text
    assert card.text.strip().endswith("# Words on the Hub")
    weights = bytearray(hub.files["german/adapter_model.safetensors"])
    weights[-1] ^= 1
    hub.files["german/adapter_model.safetensors"] = bytes(weights)
    run(
        tmp_path,
        """
        from peft_sparse.errors import FormatError
        model = base()
        try:
            PeftModel.from_pretrained(model, repo, subfolder="german")
        except FormatError as error:
            assert "sparse_ft_digest" in str(error)
        else:
            raise AssertionError("a damaged file was loaded")
        assert torch.equal(output(model), output(base()))
        """,
    )


@pytest.mark.parametrize("kind", ["PeftModel", "transformers"])
def test_a_trainer_pushes_adapters_of_any_name_while_it_trains(hub, run, tmp_path, kind):
    """transformers takes along the files of a checkpoint, and not its folders."""
    run(
        tmp_path,
        f"""
        from peft import LoraConfig
        from transformers import TrainingArguments
        from peft_sparse import SparseTrainer

        if {kind == "PeftModel"}:
            model = get_peft_model(base(), config, adapter_name="german")
            model.add_adapter("task", config)
            model.base_model.set_adapter(["german", "task"])
        else:
            model = base()
            model.add_adapter(config, adapter_name="german")
            model.add_adapter(LoraConfig(target_modules="all-linear"), adapter_name="task")
            model.set_adapter(["german", "task"])
        rows = [{{"input_ids": torch.arange(8), "labels": torch.arange(8)}}] * 4
        args = TrainingArguments(
            folder + "/out", max_steps=2, save_steps=1, use_cpu=True, report_to=[], push_to_hub=True, hub_model_id=repo
        )
        trainer = SparseTrainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        trainer._finish_current_push()
        """,
    )
    for name in ("german", "task"):
        pushed = hub.files[f"{name}/adapter_model.safetensors"]
        assert pushed in [
            (tmp_path / f"out/checkpoint-{i}/{name}/adapter_model.safetensors").read_bytes() for i in (1, 2)
        ]
        assert f"{name}/adapter_config.json" in hub.files


def test_a_saved_model_can_still_be_copied_and_pickled(tmp_path):
    model = get_peft_model(llama(), RandConfig(density=0.5, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(4)[None]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert all(model is not value for value in other._upload_modified_files.args)
