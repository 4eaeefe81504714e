"""Suggestions of the command-line tools, and the arguments that their messages name."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from distav import evaluate, train
from distav.config.cli import CommandParser, name_arguments
from distav.tools import embed, make_shards
from distav.tools.audit import command as audit
from distav.tools.inspect_shards import command as inspect_shards
from distav.tools.pseudo_label import command as pseudo_label
from tools.bench import command as bench

MAINS: dict[str, Callable[[list[str]], int]] = {
    "make_shards": make_shards.main,
    "inspect_shards": inspect_shards.main,
    "audit": audit.main,
    "embed": embed.main,
    "pseudo_label": pseudo_label.main,
    "evaluate": evaluate.main,
    "train": train.main,
    "bench": bench.main,
}


@pytest.mark.parametrize(
    ("program", "command", "messages"),
    [
        ("make_shards", "vidoes a b", ("COMMAND: 'vidoes'", "allowed: videos, csv", "Did you mean 'videos'?")),
        ("make_shards", "videos a b --shortside 32", ("unknown option --shortside", "Did you mean '--short-side'?")),
        ("inspect_shards", "prevew a", ("'prevew'", "allowed: verify, stats, preview.", "Did you mean 'preview'?")),
        ("inspect_shards", "stats a --worker=2 --clip_s 3", ("unknown option --clip_s", "Did you mean '--clips'?")),
        ("audit", "--neighbours 3", ("unknown option --neighbours", "Did you mean '--neighbors'?")),
        ("embed", "a b --uot c", ("unknown option --uot", "Did you mean '--out'?")),
        ("embed", "a b --out c --device gpuu", ("--device: 'gpuu'", "auto, gpu, cpu.", "Did you mean 'gpu'?")),
        ("pseudo_label", "a --promts b --out c", ("unknown option --promts", "Did you mean '--prompts'?")),
        ("evaluate", "a b --tasks knn fine-tune", ("--tasks: 'fine-tune'", "Did you mean 'fine_tune'?")),
        ("evaluate", "a b --epoch 3 --lrr 3", ("unknown option --lrr", "Did you mean '--lr'?")),
        ("train", "--confg a optim.lr=1", ("unknown option --confg", "Did you mean '--config'?")),
        ("train", "--config a --optim.lr=1", ("unknown option --optim.lr. Settings have no dashes: optim.lr=1.",)),
        ("make_shards", "videos a b --test-fraction nan", ("--test-fraction: 'nan': allowed: a finite number",)),
        ("bench", "bnak", ("COMMAND: 'bnak'", "Did you mean 'bank'?")),
        ("bench", "loader --codec mjepg", ("--codec: 'mjepg'", "allowed: mjpeg, vp9, h264.", "Did you mean 'mjpeg'?")),
    ],
)
def test_unknown_names_get_a_suggestion(
    program: str, command: str, messages: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit_status:
        MAINS[program](command.split())
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    for message in messages:
        assert message in error


def test_words_that_are_no_options_are_not_checked():
    parser = CommandParser()
    parser.add_argument("--text")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args(["--verb", "--text=--x", "-1", "--no option", "--", "--y"])
    assert options == argparse.Namespace(text="--x", verbose=True, words=["-1", "--no option", "--y"])


@pytest.mark.parametrize(
    ("program", "command", "message"),
    [
        ("inspect_shards", "verify nope", "inspect_shards: SHARDS=nope: no such directory."),
        ("inspect_shards", "stats gs://", "inspect_shards: SHARDS=gs://...: allowed: gs://bucket/directory"),
        ("inspect_shards", "preview ftp://a/b", "inspect_shards: SHARDS=ftp://a/b: allowed: a directory, or a URL"),
        ("make_shards", "clean nope out --decisions a.csv", "make_shards: SHARDS=nope: no such directory."),
        ("make_shards", "synthetic out --train-clips 0", "make_shards: --train-clips=0: allowed: 1 or more."),
        ("make_shards", "synthetic-multi out --train-clips -5", "make_shards: --train-clips=-5: allowed: 1 or more."),
        ("make_shards", "synthetic-multi out --test-clips -1", "make_shards: --test-clips=-1: allowed: 0 or more."),
        ("pseudo_label", "nope --prompts a --out b", "pseudo_label: SHARDS=nope: no such directory."),
        ("evaluate", "export nope", "evaluate: SHARDS=nope: no such directory."),
        ("evaluate", "export nope --json no/a.json", "evaluate: --json=no/a.json: the directory no does not exist"),
        ("inspect_shards", "stats nope --json no/a", "inspect_shards: --json=no/a: the directory no does not exist"),
        ("inspect_shards", "preview nope --out no/a.png", "inspect_shards: --out=no/a.png: the directory no does not"),
        ("bench", "tables --results nope", "bench: --results=nope: no such directory"),
    ],
)
def test_messages_name_the_argument(
    program: str,
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert MAINS[program](command.split()) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(message) and "data.root" not in error


def test_a_wrong_table_is_named_by_its_option(tiny_shards: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect_shards.main(["verify", str(tiny_shards), "--labels", "nope.csv"]) == 2
    assert capsys.readouterr().out.startswith("--labels=nope.csv: no such file.\n")


def test_only_the_names_of_settings_are_replaced():
    arguments = {"data.root": "SHARDS", "optim.lr": "--lr"}
    message = "data.root=a/data.root: no file; set data.root. or my.data.root=b, data.roots, optim.lr.x, optim.lr"
    expected = "SHARDS=a/data.root: no file; set SHARDS. or my.data.root=b, data.roots, optim.lr.x, --lr"
    assert name_arguments(message, arguments) == expected
