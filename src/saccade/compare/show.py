"""Prints the report of a comparison. Next: report.py."""

from saccade.base.values import show_count
from saccade.compare.report import ComparisonReport, Departure, Fit

SHOWN_PLACES = 16  # of a selection


def show_comparison(report: ComparisonReport) -> str:
    """As text: the verdict last, because it stays on the screen."""
    lines = [f"checkpoint   {report.model}, {report.dtype}", f"compared to  {report.other}", ""]
    width = max([len(text.name) for text in report.texts] + [6])
    head = "prompt", "tokens", "answer", "compared", "mean", "largest", "parts at"
    lines.append(f"{head[0]:{width}} {head[1]:>7} {head[2]:>7} {head[3]:>9} {head[4]:>9} {head[5]:>9}  {head[6]}")
    for text in report.texts:
        at = "-" if text.departure is None else f"token {text.departure.place}"
        numbers = f"{text.prompt_tokens:7} {text.answer_tokens:7} {text.compared:9}"
        lines.append(f"{text.name:{width}} {numbers} {text.spread.mean:9.2g} {text.spread.largest:9.2g}  {at}")
    lines.append("\ndifferences of log-probabilities, in nats; rounding alone, measured on the same tokens:")
    for bar in report.bars:
        lines.append(
            f"  {bar.name:5} mean {bar.measured.mean:.2g}, largest {bar.measured.largest:.2g};"
            f" accepted up to {bar.mean:.2g} and {bar.token:.2g}"
        )
    if report.fits:
        lines.append(
            "what explanations leave; gain: 1 if nearer at each token, -1 if farther; direction: 0.5 if all differences"
            "\npoint there, 0 if they point anywhere:"
        )
        width = max(len(fit.name) for fit in report.fits)
        lines += [f"  {fit.name:{width}}  {show_fit(fit)}" for fit in report.fits]
    lines += [f"note: {note}" for note in report.notes]
    lines += ["", *show_verdict(report)]
    return "\n".join(lines)


def show_verdict(report: ComparisonReport) -> list[str]:
    """The findings, each with the token where it starts."""
    if not report.findings:
        if not report.texts:
            return ["nothing could be compared"]
        how = {"bf16": "rounding to BF16", "fp8": "rounding of activations to FP8"}.get(report.rounding, "")
        return [f"no finding: the differences have the size of {how}"]
    lines = [f"{show_count(len(report.findings), 'finding')}:"]
    for finding in report.findings:
        lines.append(f"  {finding.kind}, {finding.name}: {finding.text}")
        if finding.kind not in ("template", "tokenizer") and finding.departure is not None:
            lines += show_departure(finding.departure, finding.prompt)
    return lines


def show_departure(departure: Departure, prompt: str | None) -> list[str]:
    """The token where it starts, and what the layers selected there."""
    said = "" if departure.explained is None else f", so explained {departure.explained:.4f}"
    numbers = f"there {departure.theirs:.4f}, checkpoint {departure.checkpoint:.4f}{said}"
    lines = [f"    starts at token {departure.place} of {prompt}, {departure.spelled}: {numbers}"]
    for look in departure.looks:
        places = ", ".join(map(str, look.selected[:SHOWN_PLACES])) + (
            ", ..." if len(look.selected) > SHOWN_PLACES else ""
        )
        kept = "" if look.kept is None else f"; there {look.kept} of these {len(look.selected)}"
        lines.append(f"    layer {look.layer} selects {places}{kept}")
    return lines


def show_fit(fit: Fit) -> str:
    votes = f"gain {fit.gain.mean:5.2f}, direction {fit.direction.mean:5.2f} +- {fit.direction.error:.2f}"
    return f"{votes}; left: mean {fit.left.mean:.2g}, largest {fit.left.largest:.2g}"
