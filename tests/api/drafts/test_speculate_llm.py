"""`speculate` as users meet it: the bundled model's text and acceptance, and checkpoints whose MTP layer is not there,
not whole, somewhere else, or stored otherwise."""

from pathlib import Path

import pytest
import torch
from drafted_texts import draw_prompts
from safetensors.torch import save_file
from small_checkpoints import decode, small_config, write_small
from torch import Tensor

from saccade import LLM, SamplingParams
from saccade.base.values import show_count
from saccade.errors import ConfigError, LoadError, PlanError

CONFIG = small_config()
MTP = "model.layers.3."


def test_the_bundled_model_s_text_is_the_same_with_drafts_and_most_of_them_are_right() -> None:
    prompts, greedy = draw_prompts(5, 160), SamplingParams(temperature=0.0, max_tokens=24)
    plain = LLM(dtype="float32").generate(prompts, greedy)
    llm = LLM(dtype="float32", speculate=5, max_requests=4)  # the others join as these end
    for k in (1, 2, 5):
        llm.engine.speculate = k
        found = llm.generate(prompts, greedy)
        wrong = [i for i, (a, b) in enumerate(zip(found, plain, strict=True)) if a.token_ids != b.token_ids]
        assert not wrong, f"speculate={k}: prompts {wrong}"
        assert all(a.text == b.text and a.finish_reason == b.finish_reason for a, b in zip(found, plain, strict=True))
    print(llm.stats)
    tally = found[-1].drafts
    assert tally is not None and tally.tokens == len(found[-1].token_ids) - 1
    assert llm.stats.kernels == "reference" == llm.settings.kernels and "; kernels: reference" in str(llm.stats)
    assert llm.stats.tally.shares[0] > 0.8 and min(llm.stats.tally.shares) > 0.5
    assert plain[0].drafts is None


def test_sampled_text_is_the_same_with_drafts() -> None:
    prompts = draw_prompts(4, 160)
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=24) for i in range(4)]
    texts = [[c.token_ids for c in LLM(dtype="float32", speculate=k).generate(prompts, params)] for k in (0, 4)]
    assert texts[0] == texts[1]


def test_auto_shows_what_it_chose() -> None:
    llm = LLM(speculate="auto")
    assert llm.settings.speculate == "auto"
    llm.generate(draw_prompts(1, 0), SamplingParams(temperature=0.0, max_tokens=140, ignore_eos=True))
    assert llm.stats.chosen.keys() == {1} and llm.stats.chosen[1] in range(6)
    assert f"{show_count(llm.stats.chosen[1], 'draft')} a step for 1 request" in str(llm.stats)


def test_streams_tell_how_drafts_fare() -> None:
    llm = LLM(speculate=3)
    pieces = list(llm.stream(draw_prompts(1, 0)[0], SamplingParams(temperature=0.0)))
    tally = pieces[-1].drafts
    assert all(piece.drafts is None for piece in pieces[:-1])  # a count that still grows says nothing
    assert tally is not None and tally.tokens == sum(len(p.token_ids) for p in pieces) - 1
    assert tally.tokens_per_step > 2 and max(len(p.token_ids) for p in pieces) == 4


# Checkpoints.


def find_drafts(root: Path, **options: object) -> tuple[list[int], list[list[int]], LLM]:
    """A text, and the drafts made at each of its steps."""
    llm = LLM(root, dtype="float32", device="cpu", **{"speculate": 3, **options})  # type: ignore[arg-type]
    prompt = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    job, drafts = llm.engine.add(prompt, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)), []
    while llm.engine.jobs:
        llm.engine.step()
        drafts.append(list(job.request.draft))
    return job.request.generated, drafts, llm


def as_bf16(tensors: dict[str, Tensor], is_chosen: "object") -> dict[str, Tensor]:
    """Matrices that are chosen as BF16 instead of FP8: exact, with scales that are powers of two."""
    result = {}
    for name, tensor in tensors.items():
        if not is_chosen(name):  # type: ignore[operator]
            result[name] = tensor
        elif not name.endswith("_scale_inv"):
            is_codes = tensor.dtype == torch.float8_e4m3fn
            result[name] = decode(tensors, name).bfloat16() if is_codes else tensor
    return result


def test_an_mtp_layer_stored_otherwise_than_the_main_layers_drafts_the_same(
    tmp_path: Path, fp8_tensors: dict[str, Tensor]
) -> None:
    """BF16 in an FP8 checkpoint, and the other way round."""
    bf16 = as_bf16(fp8_tensors, lambda _: True)
    mixtures = {
        "fp8": fp8_tensors,
        "mtp bf16": as_bf16(fp8_tensors, lambda name: name.startswith(MTP)),
        "mtp fp8": as_bf16(fp8_tensors, lambda name: not name.startswith(MTP)),
        "bf16": bf16,
    }
    found = [find_drafts(write_small(tmp_path / name, CONFIG, tensors))[:2] for name, tensors in mixtures.items()]
    assert all(each == found[0] for each in found[1:])
    assert any(found[0][1])


def test_an_mtp_layer_in_a_file_of_its_own_is_used(tmp_path: Path, fp8_tensors: dict[str, Tensor]) -> None:
    whole = write_small(tmp_path / "whole", CONFIG, fp8_tensors)
    apart = write_small(tmp_path / "apart", CONFIG, {n: t for n, t in fp8_tensors.items() if not n.startswith(MTP)})
    save_file({n: t for n, t in fp8_tensors.items() if n.startswith(MTP)}, apart / "mtp.safetensors")
    assert find_drafts(apart)[:2] == find_drafts(whole)[:2]


def test_an_mtp_layer_without_embedding_and_head_takes_the_main_ones(
    tmp_path: Path, fp8_tensors: dict[str, Tensor]
) -> None:
    tensors = dict(fp8_tensors)
    main = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    tensors |= {f"{MTP}{name}.weight": tensors[theirs].clone() for name, theirs in main.items()}
    copies = write_small(tmp_path / "copies", CONFIG, tensors)
    aliases = write_small(
        tmp_path / "aliases", CONFIG, {n: t for n, t in tensors.items() if n not in {f"{MTP}{m}.weight" for m in main}}
    )
    assert find_drafts(copies)[:2] == find_drafts(aliases)[:2]


def test_without_an_mtp_layer_drafts_are_refused_before_anything_is_loaded(
    tmp_path: Path, fp8_tensors: dict[str, Tensor]
) -> None:
    root = write_small(tmp_path / "m", CONFIG, {n: t for n, t in fp8_tensors.items() if not n.startswith(MTP)})
    with pytest.raises(
        LoadError, match=r"speculate: 3 drafts .*model\.layers\.3\.\*.*num_nextn_predict_layers=1.*without speculate"
    ):
        LLM(root, speculate=3)
    llm = LLM(root, speculate="auto", cache_tokens=256)
    assert llm.settings.speculate == 0 and any("no file has a tensor of it" in note for note in llm.settings.notes)
    assert (llm.stats.speculate, llm.stats.kernels) == (0, "")
    with pytest.raises(ConfigError, match="mtp=False"):
        LLM(mtp=False, speculate=1)


@pytest.mark.parametrize(
    "lost", ["eh_proj.weight", "hnorm.weight", "self_attn.indexer.wk.weight_scale_inv", "mlp.experts.5.up_proj.weight"]
)
@pytest.mark.parametrize("speculate", [2, "auto"])
def test_an_incomplete_mtp_layer_is_refused_by_name(
    tmp_path: Path, fp8_tensors: dict[str, Tensor], lost: str, speculate: int | str
) -> None:
    root = write_small(tmp_path / "m", CONFIG, {n: t for n, t in fp8_tensors.items() if n != MTP + lost})
    with pytest.raises(PlanError, match=r"model\.layers\.3\.") as caught:
        LLM(root, speculate=speculate)
    assert MTP + lost.removesuffix("_scale_inv") in str(caught.value)
    assert "all of it concerns the MTP layer" in str(caught.value) and "mtp=False" in str(caught.value)
    assert LLM(root, mtp=False, cache_tokens=256).settings.speculate == 0


def test_a_problem_elsewhere_is_not_put_down_to_the_mtp_layer(tmp_path: Path, fp8_tensors: dict[str, Tensor]) -> None:
    lost = (MTP + "hnorm.weight", "model.norm.weight")
    root = write_small(tmp_path / "m", CONFIG, {n: t for n, t in fp8_tensors.items() if n not in lost})
    with pytest.raises(PlanError) as caught:
        LLM(root, speculate=2)
    assert all(name in str(caught.value) for name in lost) and "concerns the MTP" not in str(caught.value)
