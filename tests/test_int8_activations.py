"""What rounding activations to 8 bits, as the dp4a kernels do, costs the demo model in 4 bits: the gate in front of them."""

import pytest
import torch

from vlquant.calib_data import demo_model
from vlquant.calib_data.samples import draw_sample, sample_request
from vlquant.decoder import LINEARS
from vlquant.distributions import compare_logits, summarize_tokens
from vlquant.quantize import quantize
from vlquant.recipe import Recipe
from vlquant.runtime.loading import layered_decoder
from vlquant.runtime import Generation, load

from tests.kernel_twin import round_activations

MOST_DIVERGENCE = 0.006
"""A tenth of what a check lets 4 bits cost, in nats per token."""
PICTURES = 24


def rounding(linear):
    """The linear behind activations rounded by the kernels' rule, which tests/test_cuda_linear.py holds the kernels to."""

    def rounded(x):
        codes, scales = round_activations(x.reshape(-1, x.shape[-1]).numpy())
        inputs = torch.from_numpy(codes).float() * torch.from_numpy(scales).repeat_interleave(32, dim=1)
        return linear(inputs.view(x.shape))

    return rounded


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(quantize(demo_model(), recipe=Recipe(method="rtn", bits=4), output=tmp_path_factory.mktemp("int8") / "bundle"), vision="torch")


def test_the_price_of_rounded_activations(pipe):
    samples = [draw_sample("development", index, seed=3) for index in range(PICTURES)]
    requests = [pipe.encode(sample_request(each, each.questions[0])) for each in samples]
    features = pipe.features(requests)
    pipe.decoder = layered_decoder(pipe.model)
    answers = [each.ids for each in pipe.batch(requests, Generation(max_new_tokens=24), features=features)]
    exact = pipe.answer_logits(requests, answers, features=features)
    pipe.decoder.layers = [layer.with_linears({name: rounding(layer.linears[name]) for name in LINEARS}) for layer in pipe.decoder.layers]
    rounded = pipe.answer_logits(requests, answers, features=features)
    found = summarize_tokens(compare_logits(*each) for each in zip(exact, rounded, answers, strict=True))
    print(f"{found.tokens} tokens: mean KL {found.mean_divergence:.5f} nats, same top token {found.top_agreement:.3f}")
    assert found.tokens > 100 and 0 < found.mean_divergence < MOST_DIVERGENCE and found.top_agreement > 0.97
