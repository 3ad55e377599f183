"""Quantize the demo model's decoder with GPTQModel, on the calibration embeddings that vlquant's own GPTQ sees.

Run by hand, in the environment that record_interop.py describes; 10 runs:
    PYTHONPATH=. GPTQMODEL_CPU_WORKERS=2 python tests/record_gptqmodel_peer.py FOLDER

FOLDER receives seedS-bitsB.safetensors: float32(scale) * (code - zero) of every decoder linear, float32 [out, in], by names
such as "layers.0.self_attn.q_proj.weight". GPTQModel wants token ids, and half of what a vision-language model is calibrated
on are visual tokens: so the decoder becomes a Llama whose embedding has one row more for each calibration token.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import CalibrationScenes
from vlquant.calibrate import CalibrationInputs, calibration_inputs
from vlquant.decoder import LINEARS
from vlquant.events import silent
from vlquant.family import LANGUAGE_MODEL
from vlquant.hf_layout import text_config, write_json
from vlquant.layout import EMBEDDING, HEAD, language_shapes
from vlquant.model import Model, open_model
from vlquant.packing import dequantize_gptq
from vlquant.recipe import Recipe
from vlquant.tokenizer import load_tokenizer, write_fast_tokenizer

from tests.record_gptqmodel import import_gptqmodel

SEEDS, BITS = range(5), (4, 3)
GROUP_SIZE = Recipe.group_size
EXPECTED_ERRORS = {4: (0.05, 0.2), 3: (0.1, 0.4)}
"""Between which the relative error of a weight lies if what was read is what was quantized."""


def write_llama(folder: Path, model: Model, inputs: CalibrationInputs) -> list[list[int]]:
    """Write the decoder with a row of the embedding for each calibration token; returns the conversations as ids."""
    decoder, tokenizer = model.config.decoder, load_tokenizer(model.folder)
    tensors = {name.replace(LANGUAGE_MODEL, "model."): model.tensor(name).float() for name in language_shapes(decoder)}
    hidden = [inputs.hidden(index)[0] for index in range(len(inputs.classes))]
    embedding = torch.cat([tensors[EMBEDDING.replace(LANGUAGE_MODEL, "model.")], *hidden])
    tensors["model.embed_tokens.weight"] = embedding
    tensors[HEAD] = torch.cat([tensors[HEAD], torch.zeros(inputs.tokens, decoder.hidden_size)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", text_config(model.config, tokenizer, "float32") | {"vocab_size": len(embedding)})
    write_fast_tokenizer(model.folder, folder)
    rows = torch.arange(decoder.vocab_size, len(embedding)).split([len(each) for each in hidden])
    return [each.tolist() for each in rows]


def gptqmodel_quantized(source: Path, conversations: list[list[int]], bits: int, output: Path) -> None:
    """Quantize with GPTQModel's defaults and save what it makes of it."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=True, desc_act=False, device="cpu")
    model = GPTQModel.load(str(source), config, dtype=torch.float32)
    given = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in conversations]
    model.quantize(given, batch_size=1)
    model.save(str(output))


def dequantized(folder: Path, layers: int, bits: int) -> dict[str, Tensor]:
    """The weights of all decoder linears that a saved checkpoint stands for."""
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = {}
    for name in [f"layers.{index}.{linear}" for index in range(layers) for linear in LINEARS]:
        parts = {kind: stored[f"model.{name}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx")}
        weights[f"{name}.weight"] = dequantize_gptq(parts, bits=bits)
    return weights


def relative_errors(weights: dict[str, Tensor], model: Model) -> list[float]:
    """How far each is from the float weight."""
    floats = {name: model.tensor(LANGUAGE_MODEL + name).float() for name in weights}
    return [float((weights[name] - floats[name]).norm() / floats[name].norm()) for name in weights]


def main(output: Path) -> None:
    import_gptqmodel()
    output.mkdir(parents=True, exist_ok=True)
    model = open_model(demo_model())
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as scratch:
            states, llama = Path(scratch) / "states", Path(scratch) / "llama"
            states.mkdir()
            llama.mkdir()
            scenes = CalibrationScenes(Recipe.samples, seed)
            inputs = calibration_inputs(model, states, scenes, most_tokens=Recipe.tokens, device="cpu", report=silent)
            conversations = write_llama(llama, model, inputs)
            for bits in BITS:
                saved = Path(scratch) / f"bits{bits}"
                gptqmodel_quantized(llama, conversations, bits, saved)
                weights = dequantized(saved, model.config.decoder.layers, bits)
                errors, (least, most) = relative_errors(weights, model), EXPECTED_ERRORS[bits]
                assert least < min(errors) and max(errors) < most, errors
                save_file(weights, output / f"seed{seed}-bits{bits}.safetensors")
                print(f"seed {seed}, {bits} bits: {inputs.tokens} tokens, errors {min(errors):.3f} .. {max(errors):.3f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
