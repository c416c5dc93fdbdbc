"""What is asked of the hub, and how: nothing where it cannot be reached, and never for code.

Where there is no network, the libraries that load from the hub try each of their files six times, half a minute and
more in all, before they look into their cache or fail. One request beforehand tells, for models and data sets alike.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from fastpeft.support.adapter_files import check_adapter, holds_adapter
from fastpeft.support.safe_paths import check_named_files

logger = logging.getLogger(__name__)

# the arguments of `from_pretrained` that say where files are
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# an option of a model's class: transformers chooses. What config.json names may be a kernel of the hub, which is code
OWN_ATTENTION = {"attn_implementation": None}
_PATIENCE = 5.0  # seconds


@functools.cache
def reachable() -> bool:
    """Whether the hub answers; where HF_HUB_OFFLINE is set, it is not asked. Found out once in a process."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # of whichever library makes the request
        logger.warning("the hub cannot be reached (%s); what was loaded before is found in the cache alone", error)
        return False
    return True


def source_options(source: str) -> dict[str, Any]:
    """Arguments of a `from_pretrained` for `source`, a folder or a hub id.

    Raises:
        FastpeftError: the folder names files outside of it, or holds an adapter that may not be read.
    """
    folder = Path(source)
    # an adapter beside a model is loaded by transformers, too
    (check_adapter if holds_adapter(folder) else check_named_files)(folder)
    return {
        "trust_remote_code": False,  # leaving it out would ask a person at a terminal
        "local_files_only": not folder.is_dir() and not reachable(),
    }


def model_options(source: str) -> dict[str, Any]:
    """The options of a model's class, which looks for an adapter at `source` too and has its own options for that."""
    options = source_options(source)
    return {**options, **OWN_ATTENTION, "adapter_kwargs": {"local_files_only": options["local_files_only"]}}
