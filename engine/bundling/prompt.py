"""What a text-conditioned network is told where nothing is asked for: the text encoder's tokens of "", made once.

Read from a diffusers pipeline's text_encoder/ and tokenizer/ by the library that owns both, of JSON, text and safetensors.
"""

from pathlib import Path

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.prior.prompted import PROMPT, TOKENS

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
_READ = (".json", ".txt", ".safetensors")


def prompt_sources(pipeline: Path, network: Path) -> list[Path]:
    """The files that the tokens come from: the network's own, where it has them, else the pipeline's text encoder's.

    Raises ConfigError where there is neither.
    """
    if (network / PROMPT).is_file():
        return [network / PROMPT]
    folders = [pipeline / ENCODER, pipeline / TOKENIZER]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(
            f"prior {network} is conditioned on text, and {missing[0]} is not there; give the whole pipeline's folder (unet/, "
            f"{ENCODER}/, {TOKENIZER}/, ...), or put what the text encoder makes of the empty prompt, {TOKENS} "
            f"[1, tokens, width], into {network / PROMPT}"
        )
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in _READ)


def empty_prompt(pipeline: Path) -> dict[str, Tensor]:
    """{encoder_hidden_states: [1, tokens, width]}, float32: as StableDiffusionPipeline.encode_prompt makes them of "".

    Raises BundleError where a file is missing or does not load.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(pipeline / TOKENIZER, local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(
            pipeline / ENCODER, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(
            f"{pipeline}: its text encoder or tokenizer does not load: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    asked = tokenizer(
        "", padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return {TOKENS: encoder.eval()(asked.input_ids)[0].contiguous()}
