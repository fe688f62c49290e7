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


def fuse_flash(c: dict[str, Any], tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The same of GLM-5.3-Flash, whose text model lies below `model.language_model.` in the files."""
    c, root = c["text_config"], "model.language_model."
    out: dict[str, Tensor] = {}
    heads, nope, v, rank = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    layers = c["num_hidden_layers"]
    out["model.embed_tokens"], out["model.norm.weight"] = (
        tensor(root + n) for n in ("embed_tokens.weight", "norm.weight")
    )
    out["lm_head"] = tensor("lm_head.weight")
    for i in range(layers + 1):
        x, file = f"model.layers.{i}.", f"{root}layers.{i}."

        def stack(*names: str, file: str = file) -> Tensor:
            return torch.cat([tensor(file + name) for name in names])

        def keep(*names: str, x: str = x, file: str = file, out: dict[str, Tensor] = out) -> None:
            out.update((x + name.removesuffix(".weight"), tensor(file + name)) for name in names)

        def vectors(*names: str, x: str = x, file: str = file, out: dict[str, Tensor] = out) -> None:
            out.update((x + name, tensor(file + name)) for name in names)

        a = "self_attn."
        vectors("input_layernorm.weight", "post_attention_layernorm.weight")
        if i < layers:
            vectors(*(f"hc_{block}_{part}" for block in ("attn", "ffn") for part in ("fn", "base", "scale")))
        if i < layers and c["layer_types"][i] == "linear_attention":
            parts = (*(f"{n}_proj.weight" for n in ("q", "k", "v", "b", "f_a", "g_a")),)
            out[x + a + "in_proj"] = stack(*(a + part for part in parts))
            out[x + a + "conv1d.weight"] = stack(*(f"{a}{n}_conv1d.weight" for n in "qkv")).squeeze(1)
            keep(*(f"{a}{n}_proj.weight" for n in ("f_b", "g_b", "o")))
            vectors(a + "A_log", a + "dt_bias", a + "o_norm.weight")
        else:
            kv_b, n = tensor(f"{file}{a}kv_b_proj.weight").view(heads, nope + v, rank), a + "indexer."
            out |= {x + a + "w_uk": kv_b[:, :nope], x + a + "w_uv": kv_b[:, nope:]}
            out[x + a + "qkv_a_proj"] = stack(a + "q_a_proj.weight", a + "kv_a_proj_with_mqa.weight")
            keep(a + "q_b_proj.weight", a + "o_proj.weight")
            vectors(a + "q_a_layernorm.weight", a + "kv_a_layernorm.weight")
            out[x + n + "wq_b"] = tensor(file + n + "wq_b.weight")
            fused = (n + "wk.weight", n + "index_kpool_compress_gate", n + "weights_proj.weight")
            out[x + n + "wk_gate_weights_proj"] = stack(*fused)
            vectors(n + "k_norm.weight", n + "k_norm.bias", n + "index_kpool_compress_ape")
        dense = i < c["first_k_dense_replace"]
        m = "mlp." if dense else "mlp.shared_experts."
        out[x + m + "gate_up_proj"] = stack(m + "gate_proj.weight", m + "up_proj.weight")
        keep(m + "down_proj.weight")
        if not dense:
            e = [f"mlp.experts.{j}." for j in range(c["n_routed_experts"])]
            out[x + "mlp.gate"] = tensor(file + "mlp.gate.weight")
            vectors("mlp.gate.e_score_correction_bias")
            gate_up = [stack(y + "gate_proj.weight", y + "up_proj.weight") for y in e]
            out[x + "mlp.experts.gate_up_proj"] = torch.stack(gate_up)
            out[x + "mlp.experts.down_proj"] = torch.stack([tensor(f"{file}{y}down_proj.weight") for y in e])
        if i == layers:
            keep("eh_proj.weight")
            vectors("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    return out
