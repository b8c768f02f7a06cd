"""Whether the Hugging Face hub can be asked: its client tries for half a minute and longer before it says no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError


def check_hub(
    repo: str, files: Sequence[str], revision: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Raise ConnectionError, at once, where none of the files is in the cache and the hub does not answer.

    It is asked twice; whatever it answers, that there is no such file too, its client goes on from there.
    """
    if any(isinstance(try_to_load_from_cache(repo, file, cache_dir, revision), str) for file in files):
        return
    for last in (False, True):
        try:
            get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision))
            return
        except HfHubHTTPError:
            return
        except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
            if last:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise ConnectionError(f"{repo}: the hub cannot be reached: {reason}") from error
