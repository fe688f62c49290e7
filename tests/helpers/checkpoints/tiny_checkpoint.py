"""A tiny checkpoint on disk with a tokenizer, for tests of the Python API."""

import json

from byte_tokenizer import SPECIAL, build_encoder
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_dict, tiny_tensors

VALUES = tiny_dict(vocab_size=264, num_hidden_layers=2, max_position_embeddings=512, eos_token_id=SPECIAL)
CONFIG = tiny_config(**VALUES)
TENSORS = {name: t.bfloat16() if t.ndim == 2 else t for name, t in tiny_tensors(CONFIG).items()}
SIZES = dict(device="cpu", cache_tokens=2048, max_batch_tokens=96)


def write(root, tokenizer=True, tensors=TENSORS):
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(VALUES))
    save_file({name: t.contiguous() for name, t in tensors.items()}, root / "model.safetensors")
    if tokenizer:
        build_encoder().save(str(root / "tokenizer.json"))
    return root
