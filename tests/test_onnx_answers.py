"""Every recorded answer about pictures, with the exported vision tower in front of the language model."""

import functools

import pytest

from vlquant.export.vision import export_vision
from vlquant.runtime import Generation
from vlquant.runtime.features import TileFeatures
from vlquant.runtime.vision_session import OnnxVision

from tests.golden_requests import pipeline, requests_of


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The vision tower of a golden checkpoint in ONNX Runtime, made once."""

    @functools.cache
    def vision(folder):
        return OnnxVision(export_vision(folder, output=tmp_path_factory.mktemp("export") / "vision"))

    return vision


def test_answers_are_the_originals(case, pictured, exported, monkeypatch):
    pipe, steps = pipeline(case.folder), pictured["generation_config"]["max_new_tokens"]
    monkeypatch.setattr(pipe, "tile_features", TileFeatures(exported(case.folder)))
    answers = pipe.batch(requests_of(pipe, pictured), Generation(max_new_tokens=steps))
    assert [answer.text for answer in answers] == case.answers(pictured)
