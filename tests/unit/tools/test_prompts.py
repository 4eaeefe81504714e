from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.data.annotations.llp import CLASSES
from distav.tools.pseudo_label.prompts import read_prompts
from tests.conftest import ROOT

LLP = ROOT / "configs" / "teachers" / "llp.yaml"


def test_llp_prompts_and_thresholds_are_those_of_valor():
    prompts = read_prompts(LLP)
    assert prompts["audio"].classes == prompts["visual"].classes == list(CLASSES)
    visual, audio = prompts["visual"], prompts["audio"]
    assert (visual.teacher, audio.teacher) == ("clip", "clap")
    assert visual.captions[0] == "A photo of people talking." and visual.captions[14] == "A photo of a vaccum cleaner."
    assert audio.captions[5] == "This is a sound of frying (food)"
    assert audio.captions[12] == "This is a sound of chicken, rooster"
    assert visual.thresholds.sum() == 394 and visual.thresholds[0] == 20 and visual.thresholds[19] == 16
    assert audio.thresholds.sum() == 44 and audio.thresholds[4] == 6 and audio.thresholds[5] == -2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("template: \"A photo of {}.\"", "template: A photo."), "visual.template='A photo.' has to contain {} once"),
        (("visual_threshold: 20", "visual_threshold: high"), "classes.Speech.visual_threshold is missing or has"),
        (("audio:\n", "voice:\n"), "audio is missing or has the wrong type; allowed: dict"),
        (("  teacher: clap\n", ""), "audio.teacher is missing"),
        (("classes:", "classes: {}\nunused:"), "classes is empty"),
        (("visual:", "visual: ["), "not valid YAML"),
    ],
)  # fmt: skip
def test_invalid_prompts_files_are_reported_with_the_key(change: tuple[str, str], message: str, tmp_path: Path):
    path = tmp_path / "prompts.yaml"
    path.write_text(LLP.read_text().replace(*change, 1))
    with pytest.raises(UserError, match=".*prompts.yaml") as error:
        read_prompts(path)
    assert message in str(error.value)
