"""The command line: commands, their options, and how they end. Next: app.py."""


def main() -> None:
    """Run the command line; ends the process. Imported on call: Ctrl-C while modules load is one line as well."""
    from saccade.cli.app import main as run

    run()
