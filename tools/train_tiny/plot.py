"""The losses over the steps, as a picture. Without matplotlib there is none, and a line says so."""

from pathlib import Path


def draw_plot(log: list[dict[str, float | str]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"{path}: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(name.partition(".")[0] for row in log for name in row if "." in name))
    longest = rows[-1] if rows else ""
    layers = range(sum(name.startswith(f"{longest}.kl.") for name in log[-1])) if log else range(0)
    panels = (
        ("loss of the language model", [f"{name}.lm" for name in rows]),
        ("answer tokens that are right", [f"{name}.hit" for name in rows]),
        ("drafts that are right, in answers", [f"{name}.mtp_hit" for name in rows]),
        (f"indexer: KL, {longest} tokens", [f"{longest}.kl.{i}" for i in layers]),
        (f"indexer: attention on its best tokens, {longest} tokens", [f"{longest}.mass.{i}" for i in layers]),
    )
    starts = [row["step"] for before, row in zip(log, log[1:], strict=False) if before["phase"] != row["phase"]]
    figure, axes = pyplot.subplots(2, 3, figsize=(18, 8), sharex=True)
    axes.flat[-1].set_visible(False)
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name in names:
            known = [(row["step"], row[name]) for row in log if name in row]
            axis.plot([step for step, _ in known], [value for _, value in known], label=name, linewidth=0.8)
        for start in starts:
            axis.axvline(start, color="grey", linewidth=0.5)
        axis.set_title(title)
        if names:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
