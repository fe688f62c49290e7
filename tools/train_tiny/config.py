"""The model that is trained: config.json as it will be exported, and what follows from it.

Sizes: 13 M numbers, 15 MB as exported. Every matrix is a whole number of 128x128 scale blocks but for one ragged
kind, as in DeepSeek-V3.2: the 320 rows of kv_a_proj (576 there). Next: weights.py makes the first weights.
"""

from typing import Any

from saccade.models.dsa.config import ModelConfig
from tools.train_tiny import vocabulary

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": vocabulary.BEGIN_ID,
    "eos_token_id": vocabulary.END_ID,
    "first_k_dense_replace": 2,
    "hidden_act": "silu",
    "hidden_size": 512,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 16,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 256,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 64,
    "vocab_size": vocabulary.SIZE,
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": vocabulary.BEGIN_ID,
    "do_sample": False,
    "eos_token_id": [vocabulary.END_ID],
}

# Residual channels from here on, the last scale block, hold the token's embedding and nothing else: no layer writes
# there. What else is known of a place stands in the blocks before.
TOKEN_ONLY = 384


def load_config(**changes: Any) -> ModelConfig:
    """The config, with some keys changed for tests and rehearsals."""
    return ModelConfig.from_dict(CONFIG | changes)
