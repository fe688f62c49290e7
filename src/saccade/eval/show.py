"""A Report as text, for people. Knows no tensors."""

from collections.abc import Callable, Iterator

from saccade.eval.evaluate import EvalReport
from saccade.inspect.findings import UPCAST_BOUND


def show_report(report: EvalReport) -> str:
    return "\n".join(
        [*_show_matches(report), *_show_drafts(report), *_show_arrangements(report), *_show_upcasts(report)]
    )


def _show_matches(report: EvalReport) -> Iterator[str]:
    yield report.command
    how = f"dtype {report.dtype}, index keys {report.index_cache}, latents {report.latent_cache}"
    how += f", activations {report.activations}"
    yield f"{report.model}, {how}, {report.device} ({report.machine})"
    yield ""
    yield f"{'task':10} {'tokens':>6} {'problems':>9}  exact match"
    for m in report.matches:
        yield f"{m.task:10} {m.length or '':>6} {m.problems:>9}  {m.share:6.1%} +- {m.error:.1%}"


def _show_drafts(report: EvalReport) -> Iterator[str]:
    if report.drafts:
        yield ""
        yield f"{'drafts of the MTP layer in answers':36} {'tokens':>6}  accepted"
    for d in report.drafts:
        yield f"  {d.places:34} {d.tokens:>6}  {d.share:8.1%}"


def _show_arrangements(report: EvalReport) -> Iterator[str]:
    if not report.probed:
        return
    yield ""
    yield f"the indexer's projection, all else fp32, on {report.probed} problems"
    yield f"{'':36} {'same':>6} {'largest':>9} {'mean':>9} {'recall':>9} {'missed mass':>12}"
    for d in report.arrangements:
        share = d.exact / report.probed
        yield (
            f"  {d.name:34} {share:6.1%} {d.log_prob_largest:9.1e} {d.log_prob_mean:9.1e} {_worst(min, d.recall, 3):>9}"
            f" {_worst(max, d.missed_mass, 4):>12}"
        )
    yield "  same: the right answer, written as `dtype` wrote it; largest, mean: difference of the answers' log-"
    yield "  probabilities; recall of the selection, and attention on what is missed, each of its worst layer."
    if None in report.arrangements[0].recall:
        yield "  No token of these texts sees more than index_topk tokens: nothing can be missed."
        return
    yield "  By layer, recall and missed mass:"
    for d in report.arrangements[1:]:
        pairs = zip(d.recall, d.missed_mass, strict=True)
        yield f"  {d.name:34} " + "  ".join(f"{recall:.3%} {mass:.4%}" for recall, mass in pairs)


def _worst(choose: Callable[[list[float]], float], values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{choose(known):.{digits}%}" if known else "-"


def _show_upcasts(report: EvalReport) -> Iterator[str]:
    if not report.upcasts:
        return
    yield ""
    yield "upcast of wk to BF16"
    for u in report.upcasts:
        span = "no scales"
        if u.least_scale is not None:
            span = f"{u.column_blocks} column blocks, {u.scales} different scales"
            span += f" from {u.least_scale:.2e} to {u.largest_scale:.2e}"
        how = "exact" if u.rounding == 0 else f"rounds by at most {u.rounding:.1e} (bound {UPCAST_BOUND:.1e})"
        yield f"  {u.tensor}: {u.stored}, {span}; {how}"
