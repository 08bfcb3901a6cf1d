"""A model's folder by its name on the Hugging Face Hub: fetched once into that library's own cache, and refused with what to do.

Only JSON, safetensors and a tokenizer's table are asked for.
Licences are accepted by people, on the model's page; here it is said where.
"""

import re
from pathlib import Path

from tiltscope.engine.errors import BundleError, ConfigError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Text besides: a tokenizer's merges.
PATTERNS = ("*.json", "*.safetensors", "*merges.txt")


def local_folder(path: Path, what: str) -> Path:
    """`path` where it is a folder; else, where it reads like OWNER/NAME, the folder that the Hub's files are in.

    Raises ConfigError where there is neither, where the Hub wants a licence accepted or a login, or cannot be reached: each says
    what to do.
    """
    name = path.as_posix()
    if path.exists() or not _ID.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except GatedRepoError as error:
        raise ConfigError(
            f"{what} {name} is gated: open {page}, log in, and accept its licence (some are granted after a wait); then make a "
            "token at https://huggingface.co/settings/tokens and run `hf auth login`, or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{what} {name} is neither a folder here nor a model on the Hub that you may see; check the name, or run "
            "`hf auth login` where it is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{what} {name} is no folder here, not in the Hub's cache, and the Hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE=1); where there is one, `hf download {name}` fetches it, and its folder can be given instead"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{what} {name} is neither a folder nor a name on the Hub: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise BundleError(
            f"{what} {name} could not be fetched: {' '.join(str(error).split())[:200]}; try again"
        ) from error
