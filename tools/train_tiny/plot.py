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

    steps = [row["step"] for row in log]
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8), sharex=True)
    panels = (
        ("loss", [f"{i}.{k}" for i in (0, 1) for k in ("lm", "mtp")]),
        ("answer tokens that are right", [f"{i}.{k}" for i in (0, 1) for k in ("hit", "mtp_hit")]),
        ("indexer: KL, long rows", [f"1.kl.{i}" for i in range(5)]),
        ("indexer: attention on its best tokens, long rows", [f"1.mass.{i}" for i in range(5)]),
    )
    starts = [row["step"] for before, row in zip(log, log[1:], strict=False) if before["phase"] != row["phase"]]
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            axis.plot(steps, [row.get(name) for row in log], label=name, linewidth=0.8)
        for start in starts:
            axis.axvline(start, color="grey", linewidth=0.5)
        axis.set_title(title)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
