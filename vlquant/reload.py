"""Is a bundle on the disk what it should be? Read back in a fresh process, it answers about one picture, one layer in memory.

`python -m vlquant.reload FOLDER` is that process: exit code 0 if it can.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlquant.calib_data.samples import sample_request, samples
from vlquant.calibrate import VisionWeights
from vlquant.decoder import rms_norm
from vlquant.rope import rotary_tables
from vlquant.errors import VlquantError
from vlquant.family import LANGUAGE_MODEL
from vlquant.model import Model, open_model
from vlquant.request import encode_request
from vlquant.runtime.linear import Workspace
from vlquant.runtime.loading import load_head, load_layer
from vlquant.tokenizer import load_tokenizer
from vlquant.vision import vision_features


def reload_elsewhere(folder: Path) -> None:
    """Reload the bundle in `folder` in another process; raises VlquantError with what it said if that fails."""
    command = [sys.executable, "-m", "vlquant.reload", str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise VlquantError(f"the written bundle cannot be read back ({reason}), and nothing was published; please report this")


@torch.inference_mode()
def reload(folder: Path) -> str:
    """The first token a bundle answers about a picture of the calibration set, through torch's vision tower.

    Raises VlquantError if what it is chosen from is not finite.
    """
    model, tokenizer = open_model(folder), load_tokenizer(folder)
    sample = next(each for each in samples("calibration", 8) if each.images)
    request = replace(sample_request(sample, sample.questions[0]), max_tiles=1)
    encoded = encode_request(request, model.config, tokenizer)
    ids = torch.tensor(encoded.ids)
    hidden = model.embedding_rows(ids).float()
    features = vision_features(encoded.pixel_values(), VisionWeights(model, "cpu"), model.config.vision)
    hidden[ids == tokenizer.token_id(model.config.chat.image_token)] = features.flatten(0, 1)
    logits = last_logits(model, hidden[None])
    if not bool(torch.isfinite(logits).all()):
        raise VlquantError("its answer to a picture is not finite")
    return tokenizer.decode([int(logits.argmax())], skip_special=False)


def last_logits(model: Model, hidden: Tensor) -> Tensor:
    """Logits [1, 1, vocab] after the last of the positions of `hidden` [1, length, hidden_size]."""
    config, workspace = model.config.decoder, Workspace("cpu")
    rotary = rotary_tables(torch.arange(hidden.shape[1])[None], config)
    for index in range(config.layers):
        hidden = load_layer(model, index, workspace)(hidden, rotary)
    norm = model.tensor(LANGUAGE_MODEL + "norm.weight").float()
    head = load_head(model, workspace)
    return head(rms_norm(hidden[:, -1:], norm, config.norm_eps))


if __name__ == "__main__":
    print(reload(Path(sys.argv[1])))
