"""Write trained weights as a checkpoint in the published `internvl_chat` layout, in bfloat16."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlquant.calib_data.vocabulary import write_json
from vlquant.config import ModelConfig
from vlquant.family import original_tensors


def publish(weights: dict[str, Tensor], config: ModelConfig, output: Path) -> None:
    """Write model.safetensors and the two small JSON files beside config.json and the tokenizer."""
    rounded = {name: each.detach().to(torch.bfloat16) for name, each in weights.items()}
    tensors = {name: each.contiguous() for name, each in original_tensors(rounded, config).items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read.
    write_json(output / "generation_config.json", {"_from_model_config": True, "eos_token_id": [2]})
    write_json(
        output / "preprocessor_config.json",
        {
            "crop_size": config.chat.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": config.chat.image_size,
        },
    )
