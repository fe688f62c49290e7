"""What the parameters of a small model are, spelled out by hand from its plain tensors: no plan/, no weights.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fuse(c: dict[str, Any], tensor: Callable[[str], Tensor], mtp_copies: bool = True) -> dict[str, Tensor]:
    """f32 parameters, main and MTP, of a config whose first layer is dense; `tensor` gives f32 values by name."""
    heads, nope, v, rank = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    experts, layers = range(c["n_routed_experts"]), c["num_hidden_layers"]
    types = c.get("indexer_types", ["full"] * layers)
    expected = {name: tensor(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")}
    expected["model.norm.weight"] = tensor("model.norm.weight")
    for i in range(layers + 1):
        x = f"model.layers.{i}."

        def get(name: str, x: str = x) -> Tensor:
            return tensor(f"{x}{name}.weight")

        kv_b = get("self_attn.kv_b_proj").view(heads, nope + v, rank)
        expected |= {x + f"{n}.weight": get(n) for n in ("input_layernorm", "post_attention_layernorm")}
        a = "self_attn."
        expected |= {x + a + f"{n}.weight": get(a + n) for n in ("q_a_layernorm", "kv_a_layernorm")}
        expected |= {x + a + n: get(a + n) for n in ("q_b_proj", "o_proj")}
        expected |= {
            x + a + "qkv_a_proj": torch.cat([get(a + "q_a_proj"), get(a + "kv_a_proj_with_mqa")]),
            x + a + "w_uk": kv_b[:, :nope],
            x + a + "w_uv": kv_b[:, nope:],
        }
        if i == layers or types[i] == "full":
            a += "indexer."
            expected |= {
                x + a + "wq_b": get(a + "wq_b"),
                x + a + "wk_weights_proj": torch.cat([get(a + "wk"), get(a + "weights_proj")]),
                x + a + "k_norm.weight": get(a + "k_norm"),
                x + a + "k_norm.bias": tensor(x + a + "k_norm.bias"),
            }
        m = "mlp." if i == 0 else "mlp.shared_experts."
        expected[x + m + "gate_up_proj"] = torch.cat([get(m + "gate_proj"), get(m + "up_proj")])
        expected[x + m + "down_proj"] = get(m + "down_proj")
        if i > 0:
            e = "mlp.experts."
            expected[x + "mlp.gate"] = get("mlp.gate")
            expected[x + "mlp.gate.e_score_correction_bias"] = tensor(x + "mlp.gate.e_score_correction_bias")
            expected[x + e + "gate_up_proj"] = torch.stack(
                [torch.cat([get(f"{e}{j}.gate_proj"), get(f"{e}{j}.up_proj")]) for j in experts]
            )
            expected[x + e + "down_proj"] = torch.stack([get(f"{e}{j}.down_proj") for j in experts])
    x = f"model.layers.{layers}."
    copies = ("embed_tokens", "shared_head.head") if mtp_copies else ()
    expected |= {x + n: tensor(f"{x}{n}.weight") for n in ("eh_proj", *copies)}
    expected |= {x + f"{n}.weight": tensor(f"{x}{n}.weight") for n in ("enorm", "hnorm", "shared_head.norm")}
    return expected
