"""Folders and files that are no model which can be read: each is named for what it is, with a cure, on one line."""

import re
from pathlib import Path

import pytest
from commands import Run
from header_checkpoints import published, write_headers
from small_checkpoints import small_config

from saccade.checkpoint.foreign import describe_names

SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
TEXTS = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
FOLDERS: dict[str, tuple[list[str], str]] = {  # files -> what is said of the folder
    "pickles": (["config.json", *SHARDS], r"holds pytorch_model-00001-of-00002.bin, which is PyTorch's pickle format, .*save_pretrained"),
    "one pickle": (["config.json", "pytorch_model.bin", *TEXTS], "holds pytorch_model.bin, which is PyTorch's pickle"),
    "consolidated": (["params.json", "consolidated.00.pth"], "holds consolidated.00.pth, which is PyTorch's pickle"),
    "lightning": (["last.ckpt"], "holds last.ckpt, which is PyTorch's pickle"),
    "a .pt": (["model.pt", "README.md"], "holds model.pt, which is PyTorch's pickle"),
    "GGUF": (["README.md", "m-Q4_K.gguf"], r"holds m-Q4_K.gguf, which is GGUF and not supported; expected .safetensors .*FP8 128x128.*take the repository"),
    "TensorFlow": (["config.json", "tf_model.h5"], "holds tf_model.h5, which is TensorFlow's format"),
    "TensorFlow's own": (["saved_model.pb"], "holds saved_model.pb, which is TensorFlow's format"),
    "TensorFlow checkpoints": (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "which is TensorFlow's format"),
    "Flax": (["config.json", "flax_model.msgpack"], "holds flax_model.msgpack, which is Flax's format"),
    "ONNX": (["config.json", "model.onnx", "model.onnx_data"], "holds model.onnx, which is ONNX"),
    "an adapter": (["adapter_config.json", "adapter_model.safetensors", *TEXTS], "holds adapter_config.json, a LoRA adapter, .*merge it"),
    "an adapter as a pickle": (["adapter_config.json", "adapter_model.bin", "optimizer.pt"], "a LoRA adapter, which changes another"),
    "an adapter with a config": (["adapter_model.safetensors", "config.json"], "a LoRA adapter"),
    "a tokenizer": (["README.md", *TEXTS], r"holds a tokenizer \(special_tokens_map.json\) but no .safetensors file with weights; .*hf download"),
    "no weights": (["config.json", *TEXTS], "holds config.json but no .safetensors file with weights; .*hf download"),
    "nothing": ([], "is empty; expected .safetensors files"),
    "only what is hidden": ([".gitattributes", ".cache/huggingface/x"], "is empty; expected"),
    "something else": (["notes.txt"], "holds no .safetensors file; expected"),
    "a model below": (["README.md", "fp8/model.safetensors", "fp8/config.json"], "holds no model itself, but its folder fp8 does: name that"),
    "a model below a pickle": (["pytorch_model.bin", "safe/model.safetensors"], "its folder safe does: name that"),
    "a download cache": (["refs/main", "blobs/0a", "snapshots/0a1b/model.safetensors"], "its folder snapshots/0a1b does"),
    "models below": ([f"{c}/model.safetensors" for c in "abcde"], r"5 folders below do: name one \(a, b, c, \.\.\.\)"),
    "adapters below": (["checkpoint-1/adapter_model.safetensors"], "holds no .safetensors file"),
    "too far below": (["a/b/c/model.safetensors"], "holds no .safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_a_model_is_named_for_what_it_holds(run: Run, case: str, tmp_path: Path) -> None:
    files, said = FOLDERS[case]
    folder = tmp_path / "m"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    for line in (
        ["check", folder],
        ["generate", folder, "--prompt", "a"],
        ["convert", folder, tmp_path / "o", "--bf16"],
    ):
        ran = run(*line)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert re.fullmatch(f"saccade: {folder}: .*{said}.*\n", ran.err), ran.err


FILES = {
    "config.json": "is one file of a model: name its directory, {folder}",
    "model.safetensors.index.json": "is one file of a model: name its directory, {folder}",
    "x.gguf": "is GGUF and not supported; expected .safetensors files",
    "pytorch_model.bin": "is PyTorch's pickle format, which can run code when it is opened, and not supported",
    "tf_model.h5": "is TensorFlow's format and not supported",
    "adapter_model.safetensors": "is a LoRA adapter, which changes another model",
}


def test_a_file_is_named_for_what_it_is(run: Run, tmp_path: Path) -> None:
    config = small_config()
    folder = write_headers(tmp_path / "m", config, published(config, True))
    for name, said in FILES.items():
        (folder / name).exists() or (folder / name).write_bytes(b"{}")
        ran = run("check", folder / name)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert ran.err.startswith(f"saccade: {folder / name}: {said.format(folder=folder)}"), ran.err
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt: is not a directory; expected a model directory" in run("check", tmp_path / "notes.txt").err


def test_what_lies_beside_a_model_does_not_hide_it() -> None:
    for others in (
        ["pytorch_model.bin"],
        ["x.gguf"],
        ["adapter_config.json", "adapter_model.safetensors"],
        ["tf_model.h5"],
    ):
        assert describe_names(["config.json", "model.safetensors", *others]) is None
        assert describe_names(["config.json", "model.safetensors.index.json", *others]) is None
