"""A whole checkpoint on this machine: where a path points, or downloaded from the Hub.

Knows no torch and no tensor. Next: open.py, which only wants the headers.
"""

from pathlib import Path

from saccade.checkpoint.open import bundled_path, looks_remote
from saccade.errors import CheckpointError

FILES = ["*.safetensors", "*.json", "*.jinja"]  # what loading and text need; no .bin, no pictures


def fetch_checkpoint(path: str | Path | None) -> Path:
    """The local directory (or .safetensors file) of `path`: itself, the bundled checkpoint for None or "", or the
    cached download of a Hugging Face id. Raises CheckpointError if an id cannot be had; a path is not looked at."""
    if path is None or path == "":
        return bundled_path()
    if not looks_remote(path):
        return Path(path).expanduser()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=FILES))
    except RepositoryNotFoundError:
        why = "neither a directory here nor a model on Hugging Face that this account may see"
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "Hugging Face cannot be reached"
        why = f"not a directory here, not in the download cache, and {offline}"
    except (HfHubHTTPError, OSError) as error:
        why = f"the download failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    raise CheckpointError(f"{path}: {why}")
