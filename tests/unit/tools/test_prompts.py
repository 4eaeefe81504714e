from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.data.annotations.llp import CLASSES
from distav.tools.pseudo_label.prompts import read_prompts
from tests.conftest import ROOT

LLP = ROOT / "configs" / "teachers" / "llp.yaml"


def test_the_published_prompts_and_thresholds():
    prompts = read_prompts(LLP)
    assert prompts["audio"].classes == prompts["visual"].classes == list(CLASSES)
    visual, audio = prompts["visual"], prompts["audio"]
    assert visual.captions[0] == "A photo of people talking." and visual.captions[14] == "A photo of a vaccum cleaner."
    assert audio.captions[5] == "This is a sound of frying (food)"
    assert audio.captions[12] == "This is a sound of chicken, rooster"
    assert visual.thresholds.sum() == 394 and visual.thresholds[0] == 20 and visual.thresholds[19] == 16
    assert audio.thresholds.sum() == 44 and audio.thresholds[4] == 6 and audio.thresholds[5] == -2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("template: \"A photo of {}.\"", "template: A photo."), "visual.template='A photo.' has to hold {} once"),
        (("visual_threshold: 20", "visual_threshold: high"), "classes.Speech.visual_threshold is missing or not of"),
        (("audio:\n", "sound:\n"), "audio is missing or not of the kind dict"),
        (("classes:", "classes: {}\nothers:"), "classes is empty"),
        (("visual:", "visual: ["), "is not valid YAML"),
    ],
)  # fmt: skip
def test_faults_are_named_by_their_place(change: tuple[str, str], told: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(LLP.read_text().replace(*change, 1))
    with pytest.raises(UserError, match=".*mine.yaml") as error:
        read_prompts(path)
    assert told in str(error.value)
