"""Protocols of `distav/evaluate.py`, and means over folds."""

from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.evaluate import _parser
from distav.evaluation.protocols import DIRECTORY, parse_with_protocol
from distav.evaluation.summary import over_folds


@pytest.mark.parametrize("name", [file.stem for file in DIRECTORY.glob("*.yaml")])
def test_every_protocol_can_be_parsed(name: str):
    options = parse_with_protocol(_parser(), ["export", "shards", "--protocol", name])
    assert options.tasks and options.views >= 1


def test_options_of_the_command_line_replace_those_of_a_protocol(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("tasks: [svm, knn]\nviews: 4\nlr: 1.0e-4\nwarmup_epochs: 3\nby_video: true\n")
    options = parse_with_protocol(_parser(), ["e", "a", "b", "--protocol", str(file), "--views", "2"])
    assert (options.tasks, options.views, options.lr, options.warmup_epochs) == (["svm", "knn"], 2, 1e-4, 3)
    assert options.shards == ["a", "b"] and options.by_video


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("veiws: 3", "veiws: allowed: .*Did you mean 'views'"),
        ("- views", "allowed: a mapping from options to values"),
        ("views: [1", "is not valid YAML"),
        ("protocol: esc50", "protocol: allowed:"),
    ],
)
def test_invalid_protocols_are_rejected(text: str, message: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_with_protocol(_parser(), ["e", "a", "--protocol", str(file)])


def test_values_of_a_protocol_are_checked_like_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "mine.yaml"
    file.write_text("tasks: [svmm]")
    with pytest.raises(UserError, match=r"mine\.yaml: --tasks: 'svmm': .*Did you mean 'svm'"):
        parse_with_protocol(_parser(), ["e", "a", "--protocol", str(file)])
    file.write_text("views: ten")
    with pytest.raises(UserError, match=r"mine\.yaml: --views: invalid int value: 'ten'"):
        parse_with_protocol(_parser(), ["e", "a", "--protocol", str(file)])
    parser = _parser()
    with pytest.raises(SystemExit):
        parse_with_protocol(parser, ["e", "a", "--views", "ten"])
    assert "invalid int value" in capsys.readouterr().err
    with pytest.raises(UserError, match="--protocol=esc5: allowed: a YAML file, .*Did you mean 'esc50'"):
        parse_with_protocol(_parser(), ["e", "a", "--protocol", "esc5"])


def test_folds_without_a_metric_do_not_count():
    folds = [{"metrics": {"knn": {"top1_both": 0.5, "top1_audio": 0.2}}}, {"metrics": {"knn": {"top1_both": 0.7}}}]
    results = over_folds(folds)
    assert results["metrics"]["knn"] == pytest.approx({"top1_both": 0.6, "top1_audio": 0.2})
    assert results["std"]["knn"] == pytest.approx({"top1_both": 0.02**0.5})
    assert "std" not in over_folds(folds[:1])
