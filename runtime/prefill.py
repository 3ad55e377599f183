"""A prompt into the cache, on a GPU in parts so that activations of a long one stay small. Knows a decoder, no ids or text."""

from torch import Tensor

from vlquant.decoder import Decoder
from vlquant.rope import rope_depends_on_length
from vlquant.runtime.conversation_cache import Cache
from vlquant.runtime.native_decoder import NativeDecoder

TOKENS_AT_A_TIME = {"cpu": None, "cuda": 1024}
"""By device; None: all at once. A part expands every weight again, which costs a few percent of its arithmetic at 1024."""


def prefill(
    decoder: Decoder | NativeDecoder, embeddings: Tensor, attention_mask: Tensor, cache: Cache, *, at_a_time: int | None = None
) -> Tensor:
    """Logits float32 [batch, vocab] after a prompt, which is in the cache then.

    embeddings: [batch, length, hidden_size]; attention_mask: bool [batch, cached + length], False where a row is padded left;
    at_a_time: tokens per part, None: as the device has it. A prompt that long rope or dynamic NTK treats otherwise than a
    shorter one goes in whole, as the original has it.
    """
    length = embeddings.shape[1]
    part = at_a_time or TOKENS_AT_A_TIME[embeddings.device.type] or length
    known = cache.length
    if rope_depends_on_length(decoder.config, known + length):
        part = length
    for start in range(0, length, part):
        stop = min(start + part, length)
        logits = decoder(embeddings[:, start:stop], attention_mask=attention_mask[:, : known + stop], cache=cache)
    return logits[:, -1]
