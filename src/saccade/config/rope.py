"""The rotary embedding that a config.json asks for: plain, or stretched by YaRN.

A config has rope_theta with rope_scaling, or rope_parameters. Both are read here and nowhere else. models/dsa/rope.py
computes the angles. Next: model.py, which holds the result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from saccade.config.foreign import refuse_foreign_rope
from saccade.config.keys import Keys, show_json


@dataclass(frozen=True)
class Rope:
    """Rotary embedding; plain unless `is_yarn`. `mscale` values of 0 and null are the same: not set."""

    theta: float
    original_max_position: int
    is_yarn: bool = False
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def magnitude(self, mscale: float = 1.0) -> float:
        """m(x) = 0.1 x ln(factor) + 1, the YaRN paper's correction of attention entropy; 1 without stretching."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.is_yarn and self.factor > 1 else 1.0


# Used or checked inside rope_scaling and rope_parameters; "type" is the old name of "rope_type".
ROPE_KEYS = {
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor",
}  # fmt: skip


def read_rope(keys: Keys, max_position: int) -> Rope:
    """The old spelling (rope_theta and rope_scaling) and the new (rope_parameters); both at once must agree."""
    merged = {k: v for k in ("rope_theta", "original_max_position_embeddings") if (v := keys.values.get(k)) is not None}
    for place in ("rope_scaling", "rope_parameters"):
        for name, value in keys.table(place).items():
            name = "rope_type" if name == "type" else name
            if isinstance(value, Mapping):
                keys.refuse(f"{place}.{name}", value, "expected one RoPE for all layers")
            elif value is not None and merged.setdefault(name, value) != value:
                keys.refuse(f"{place}.{name}", value, f"elsewhere in the config it is {show_json(merged[name])}")
    rope = Keys(merged, "rope_parameters.", keys.problems, keys.notes)
    rope.note_unknown(ROPE_KEYS | refuse_foreign_rope(rope, ROPE_KEYS))
    rope.expect("rope_type", ("default", "yarn"))
    rope.expect("partial_rotary_factor", (1,))
    if "rope_type" not in merged and "factor" in merged:
        keys.problems.append("rope_parameters.rope_type: absent, but a factor is given; expected default or yarn")
    if "rope_theta" not in merged:
        keys.notes.append("rope_theta is not given: took 10000, as transformers does")
    theta = rope.number("rope_theta", default=10000.0)
    rope.within("rope_theta", theta, 2, 1e15)
    if merged.get("rope_type") != "yarn":
        unused = [name for name in ("factor", "mscale", "attention_factor") if merged.get(name, 1) not in (0, 1)]
        keys.notes += [f"rope_parameters.{name} is not used: the rope_type is default" for name in unused]
        return Rope(theta, max_position)
    original = rope.whole("original_max_position_embeddings", default=max_position)
    factor = rope.number("factor", default=max_position / max(original, 1))
    rope.within("factor", factor, 1, 1e6)
    fast, slow = rope.number("beta_fast", default=32.0), rope.number("beta_slow", default=1.0)
    for name, beta in (("beta_fast", fast), ("beta_slow", slow)):
        rope.within(name, beta, 1e-3, 1e6)  # turns within the context; 1e-320 overflows where frequencies are found
    if fast < slow:
        rope.refuse("beta_fast", fast, f"expected at least beta_slow = {slow}")
    mscale, all_dim = (rope.number(name, default=0.0, zero=True) or None for name in ("mscale", "mscale_all_dim"))
    attention = rope.number("attention_factor") if "attention_factor" in merged else None
    for name, scale in (("mscale", mscale), ("mscale_all_dim", all_dim), ("attention_factor", attention)):
        rope.within(name, scale or 0, 1e-3, 1e3)
    return Rope(theta, original, True, factor, fast, slow, mscale, all_dim, attention, rope.flag("truncate", True))
