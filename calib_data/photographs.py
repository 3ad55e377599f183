"""Photographs: those that come inside scikit-image and scikit-learn, and the user's own folders. Imports neither library."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vlquant.calib_data.conversations import Conversation
from vlquant.errors import InvalidRequest, MissingDependency
from vlquant.request import Request

DESCRIBE = "Please describe the image in detail."
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
"""Where in a library its pictures are."""
DESCRIPTIONS = {
    ("skimage", "astronaut.png"): "A smiling woman with short blond hair sits for a portrait in an orange space suit, her helmet "
    "beside her. Behind her are the flag of the United States and a model of a space shuttle.",
    ("skimage", "brick.png"): "A wall of long dark bricks with light mortar between them, in black and white. It fills the picture.",
    ("skimage", "camera.png"): "A black and white photograph of a man in a dark coat who looks through a camera on a tripod. He "
    "stands on a lawn; there are a tall tower and other buildings in the distance.",
    ("skimage", "cell.png"): "A microscope picture of a single round, bright cell with a dark rim on a grey, slightly rippled ground.",
    ("skimage", "chelsea.png"): "The face of a tabby cat with orange fur, green eyes, a pink nose and long white whiskers, seen from "
    "close by. It looks past the camera to the right.",
    ("skimage", "clock_motion.png"): "A round, bright clock on a plain grey wall, blurred sideways because it or the camera moved.",
    ("skimage", "coffee.png"): "A cup of coffee on a red saucer with a small silver spoon, on a table of brown wooden boards.",
    ("skimage", "coins.png"): "Twenty-four old coins on a dark ground, in four rows of six. They are worn, of different sizes, and "
    "many show heads.",
    ("skimage", "grass.png"): "Dry grass and small leaves on the ground, seen from above in black and white.",
    ("skimage", "gravel.png"): "Gravel seen from above in black and white: many small angular stones that fill the picture.",
    ("skimage", "hubble_deep_field.jpg"): "A deep view into space with hundreds of galaxies on a black sky, most of them tiny points, "
    "some of them orange, blue or white with a visible shape.",
    ("skimage", "ihc.png"): "A stained section of tissue under a microscope: glands with brown borders, and between them loose "
    "tissue with many small blue nuclei.",
    ("skimage", "moon.png"): "The grey surface of the moon with some small craters, one of them bright, and rough dark ground below.",
    ("skimage", "motorcycle_left.png"): "A red motorcycle with a black seat stands in a garage. Behind it are shelves full of boxes "
    "and a wooden bench.",
    ("skimage", "page.png"): 'A photographed page of a text in English with the heading "Region-based segmentation". The paragraph '
    'begins "Let us first determine markers of the coins and the background."',
    ("skimage", "retina.jpg"): "The inside of a human eye, round and orange-red on black: a bright spot on the left, from which "
    "branching blood vessels spread, and a darker spot in the middle.",
    ("skimage", "rocket.jpg"): "A white rocket stands on its launch pad at dusk. Bright lights shine at its foot, and tall lattice "
    "towers stand around it under a dark blue sky.",
    ("skimage", "text.png"): "Handwritten mathematical formulas in black on grey paper, photographed at an angle and a little blurred.",
    ("sklearn", "china.jpg"): "A Chinese pavilion with several storeys and green and red curved roofs rises above trees. Behind it "
    "there is a wide lake with hazy hills.",
    ("sklearn", "flower.jpg"): "A round orange dahlia with many petals in full bloom, before a blurred ground of dark green leaves. "
    "Part of a second flower can be seen below it.",
}
"""What each shows. Pictures that are no photographs are left out, and of stereo pairs the second one."""


@dataclass(frozen=True)
class Photographs:
    """Pictures with the same request about each, described or not."""

    described: tuple[tuple[Path, str | None], ...]

    def __len__(self) -> int:
        return len(self.described)

    def __getitem__(self, index: int) -> Conversation:
        path, description = self.described[index]
        return Conversation(str(path), Request(DESCRIBE, images=(path,)), description)


def installed_photographs() -> Photographs:
    """Those inside the libraries that are installed; raises MissingDependency if there are none."""
    folders = {library: pictures_inside(library) for library in FOLDERS}
    described = [(folders[library] / name, text) for (library, name), text in DESCRIPTIONS.items() if folders[library]]
    found = tuple((path, text) for path, text in described if path.is_file())
    if not found:
        raise MissingDependency(
            "--calib photos takes photographs out of scikit-image and scikit-learn, and neither is installed; "
            "pip install scikit-image scikit-learn"
        )
    return Photographs(found)


def pictures_inside(library: str) -> Path | None:
    """The folder of a library's pictures, found without importing it; None if it is not installed."""
    spec = find_spec(library)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / FOLDERS[library] if places else None


def folder_photographs(folder: Path) -> Photographs:
    """All pictures in a folder and below, without descriptions; raises InvalidRequest if there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise InvalidRequest(f"{folder} holds no pictures; give a folder with {', '.join(ENDINGS)} files, or a .jsonl or .tsv file")
    return Photographs(tuple((path, None) for path in paths))
