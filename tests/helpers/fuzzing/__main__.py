"""Repeats one case: `python tests/helpers/fuzzing fuzz_headers 7`."""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(folder) for folder in HERE.parent.iterdir() if folder.is_dir()]
runpy.run_path(str(HERE / f"{sys.argv.pop(1)}.py"), run_name="__main__")
