"""What is fetched from the Hub, from a server on this machine that stands in for it."""

import json
import os
import subprocess
import sys

import hub
import numpy as np
import pytest
import safetensors.numpy
from support import require

READ = """
import json
from lorax.tasks import sources
for settings in {settings}:
    try:
        sets = sources.read({{"name": "instruct", **settings}})
        print(json.dumps({{name: [list(x) for x in found] for name, found in sets.items()}}))
    except (ValueError, FileNotFoundError) as error:
        print(json.dumps(str(error)))
"""
FIND = """
import json
from lorax.models.directories import find
folder = find("me/tiny")
print(json.dumps(sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.*"))))
"""
PAIR = {"prompt": "a", "completion": "b"}


@pytest.fixture
def ask(tmp_path):
    """Runs code in a process whose Hub serves tmp_path/hub; returns its JSON lines."""
    server = hub.serve(tmp_path / "hub")
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }

    def run(code, **more):
        env = os.environ | settings | more
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield run
    server.shutdown()


ADAPTER = """
import json
from lorax.interop import formats
for path in ("me/lora", "me/lora/sub/one.safetensors", "me/none", "me/lora/no.safetensors"):
    try:
        print(json.dumps([(update.layer, update.scale) for update in formats.read(path).updates]))
    except FileNotFoundError as error:
        print(json.dumps(str(error)))
"""


def test_an_adapter_comes_by_the_name_of_its_repository_or_of_a_file_in_it(tmp_path, ask):
    folder = tmp_path / "hub/me/lora"
    (folder / "sub").mkdir(parents=True)
    pair = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    names = {"": "lora_unet_a.lora_{}.weight", "sub": "base_model.model.b.lora_{}.weight"}
    for (where, name), ways in zip(names.items(), (("down", "up"), "AB"), strict=True):
        tensors = {name.format(way): x for way, x in zip(ways, pair, strict=True)}
        safetensors.numpy.save_file(tensors, folder / where / "one.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (folder / "sub" / "adapter_config.json").write_text(json.dumps(config))
    for base in ("model.safetensors", "model-00001-of-00002.safetensors"):
        (folder / base).write_bytes(b"a base, which is not fetched")
    whole, inside, missing, not_in_it = ask(ADAPTER)
    assert (whole, inside) == ([["lora_unet_a", 1]], [["b", 3]])
    assert missing.startswith("me/none: no such file or directory, and reading it from the Hub")
    assert "there is no no.safetensors in me/lora" in not_in_it


def write(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_model_comes_with_all_that_writing_texts_needs(tmp_path, ask):
    needed = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    needed += ["special_tokens_map.json", "chat_template.jinja", "model.safetensors"]
    needed += ["additional_chat_templates/tool_use.jinja"]
    for name in [*needed, "pytorch_model.bin", "modeling_tiny.py", "onnx/model.onnx"]:
        file = tmp_path / "hub/me/tiny" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert ask(FIND) == [sorted(needed)]
    assert ask(FIND, HF_HUB_OFFLINE="1") == [sorted(needed)]  # from the cache


def test_a_data_set_is_read_by_its_id(tmp_path, ask):
    require("datasets")
    lines = lambda n: "".join(json.dumps({**PAIR, "prompt": f"{i}"}) + "\n" for i in range(n))
    write(tmp_path / "hub/me/chats", train__jsonl=lines(3), test__jsonl=lines(1))
    write(tmp_path / "hub/me/coded", coded__py="raise SystemExit('it ran')")
    asked = [{}, {"split": "test,train"}, {"split": "train,dev"}, {"subset": "other"}]
    asked = [{"path": "me/chats", **x} for x in asked]
    asked += [{"path": "me/coded"}, {"path": "me/absent"}]
    usual, turned, *errors = ask(READ.format(settings=asked))
    assert usual["train"][2] == ["me/chats/train[2]", {**PAIR, "prompt": "2"}]
    assert {name: len(found) for name, found in usual.items()} == {"train": 3, "test": 1}
    assert {name: len(found) for name, found in turned.items()} == {"train": 1, "eval": 3}
    for error, start in zip(
        errors,
        (
            "task.split: 'me/chats': Unknown split \"dev\"",
            "task.subset: 'me/chats': BuilderConfig 'other' not found",
            "task.path: 'me/coded' needs code to be loaded, which lorax doesn't run",
            "task.path: 'me/absent' is no file or folder, and loading it as a data set of the Hub",
        ),
        strict=True,
    ):
        assert error.startswith(start), error
    again = ask(READ.format(settings=asked[:1]), HF_HUB_OFFLINE="1")
    assert again == [usual]
