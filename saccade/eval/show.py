"""A Report as text, for people. Knows no tensors."""

from collections.abc import Iterator

from saccade.eval.evaluate import Report
from saccade.inspect.findings import UPCAST_BOUND


def show_report(report: Report) -> str:
    return "\n".join(
        [*_show_matches(report), *_show_drafts(report), *_show_arrangements(report), *_show_upcasts(report)]
    )


def _show_matches(report: Report) -> Iterator[str]:
    yield f"{report.model}, dtype {report.dtype}, {report.device}"
    yield ""
    yield f"{'task':10} {'tokens':>6} {'problems':>9}  exact match"
    for m in report.matches:
        yield f"{m.task:10} {m.length or '':>6} {m.problems:>9}  {m.share:6.1%} +- {m.error:.1%}"


def _show_drafts(report: Report) -> Iterator[str]:
    if report.drafts:
        yield ""
        yield f"{'drafts of the MTP layer in answers':36} {'tokens':>6}  accepted"
    for d in report.drafts:
        yield f"  {d.places:34} {d.tokens:>6}  {d.share:8.1%}"


def _show_arrangements(report: Report) -> Iterator[str]:
    if not report.probed:
        return
    yield ""
    yield f"the indexer's projection, all else fp32, on {report.probed} problems"
    yield f"{'':36} {'exact':>6} {'largest':>9} {'mean':>9} {'recall':>9} {'missed mass':>12}"
    for d in report.arrangements:
        share = d.exact / report.probed
        yield (
            f"  {d.name:34} {share:6.1%} {d.log_prob_largest:9.1e} {d.log_prob_mean:9.1e} {min(d.recall):9.3%}"
            f" {max(d.missed_mass):12.4%}"
        )
    yield "  largest, mean: difference of log-probabilities; recall of the selection and attention mass on what"
    yield "  is missed, both of the worst layer. By layer, recall and missed mass:"
    for d in report.arrangements[1:]:
        pairs = zip(d.recall, d.missed_mass, strict=True)
        yield f"  {d.name:34} " + "  ".join(f"{recall:.3%} {mass:.4%}" for recall, mass in pairs)


def _show_upcasts(report: Report) -> Iterator[str]:
    yield ""
    yield "upcast of wk to BF16"
    for u in report.upcasts:
        span = f"scales {u.least_scale:.2e} to {u.largest_scale:.2e}, {u.column_blocks} column blocks differ"
        how = "exact" if u.rounding == 0 else f"rounds by at most {u.rounding:.1e} (bound {UPCAST_BOUND:.1e})"
        yield f"  {u.tensor}: {u.stored}, {span}; {how}"
