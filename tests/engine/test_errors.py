"""Mistakes users make, and the one paragraph each of them gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.catalog import PAPERS
from zoo.cli import main

TINY = Path(__file__).with_name("tiny.yaml")
SHAPES = "classify/shapes_polyrelu"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_DEBUG", raising=False)
    (tmp_path / "corpus.txt").write_bytes(bytes((i * i + 7 * i) % 251 for i in range(660)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank/nothing.txt").touch()
    (tmp_path / "typo.yaml").write_text("trainer:\n  max_epocs: 3\n")
    (tmp_path / "torn.yaml").write_text("trainer: [\n")
    return tmp_path


def failing(*arguments: str, capsys: pytest.CaptureFixture) -> str:
    """What stderr says of a command that must exit with status 2; one line, no traceback."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--model.act=polyrelo"], "model.act: no activation is called 'polyrelo'. Did you mean 'polyrelu' or"),
        (
            ["--model.act={name: polyrelu, ordr: 2}"],
            "model.act: activation 'polyrelu' has no argument 'ordr'. Did you mean 'order'? It takes (order=3, ",
        ),
        (["--model.act={name: polyrelu, order: 0}"], "polyrelu: order must be an integer >= 1, got 0"),
        (
            ["--model.act={name: polyrelu, init: [1, 2]}"],
            "polyrelu: init must be a number or 3 numbers, one a power from x^3 down, got 2",
        ),
        (["--model.norm=polynorm"], "model.norm: 'polynorm' is an activation, not a norm."),
        (["--model.backbone=resnet19"], "ImageClassifier: timm has no model 'resnet19'. Did you mean 'resnet"),
        (["--model.widht=3"], "no argument is called 'widht'. Did you mean 'width'?"),
        (["--data.batch_szie=3"], "no argument is called 'batch_szie'. Did you mean 'batch_size'?"),
        (["--data.size=x"], "size: expected int, got 'x'"),
        (["--data.size=3"], "Shapes: size must be at least 12 pixels for 1 object(s), got 3"),
        (
            ["--data.num_classes=3"],
            "the data has 3 classes, the model 6; give model.num_classes and data.num_classes the same",
        ),
        (["--trainer.max_epocs=3"], "no option is called '--trainer.max_epocs'. Did you mean '--trainer.max_epochs'?"),
        (["--trainer.max_epochs=abc"], "trainer.max_epochs: expected int or null, got 'abc'"),
        (["--last.every_n=3"], "no option is called '--last.every_n'. Did you mean '--last.every_n_train_steps'?"),
        (["--last.every_n_train_steps=0"], "last.every_n_train_steps must be at least 1, got 0"),
        (["--model=ImageClasifier"], "model: no class is called 'ImageClasifier'. Did you mean 'ImageClassifier'?"),
        (
            ["--model.optimizer=torch.optim.Adm"],
            "optimizer: no class is called 'torch.optim.Adm'. Did you mean 'torch.optim.Adam'?",
        ),
        (["--model.lr_scheduler.warmup_steps=-3"], "lr_scheduler: warmup_steps must be at least 0, got -3"),
        (["--config=typo.yaml"], "no option is called 'trainer.max_epocs'. Did you mean 'trainer.max_epochs'?"),
        (["--config=torn.yaml"], "torn.yaml is not valid YAML at line 2: expected the node content"),
        (["--config=torm.yaml"], "no config file at 'torm.yaml'. Did you mean 'torn.yaml'? Shipped configs: classify/"),
        (
            ["--ckpt_path=last"],
            "no checkpoint at runs/shapes_polyrelu/checkpoints/last.ckpt; train first with `zoo fit`",
        ),
        (["--ckpt_path=x.ckpt"], "no checkpoint at x.ckpt; check the path"),
        (["--run_dir=corpus.txt/run"], "cannot make the run directory corpus.txt/run: "),
    ],
    ids=lambda value: value[-1].lstrip("-") if isinstance(value, list) else "",
)
def test_mistake_gets_one_sentence(mistake: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert failing("fit", f"--config={SHAPES}", *mistake, capsys=capsys).startswith(message)
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--data.path=nowhere"], "no text at nowhere; pass a file, a folder, or nothing for Python's sources"),
        (["--data.path=empty"], "text folder empty holds no file matching '*.txt'; pass pattern= or another path"),
        (["--data.path=blank"], "all 1 files matching '*.txt' in blank are empty; pass another path"),
        (
            ["--data.path=corpus.txt", "--data.context=600"],
            "the text of corpus.txt holds 660 bytes, 561 of them for training, but a sample reads 601",
        ),
        (
            ["--data.path=corpus.txt", "--data.batch_size=99"],
            "the training split holds 35 examples, fewer than one batch of 99",
        ),
        (
            ["--data.path=corpus.txt", "--data.context=32"],
            "the data has context 32, the model at most 16; give model.context and data.context the same value",
        ),
        (
            ["--data.path=corpus.txt", "--model.num_heads=3"],
            "num_heads must divide dim into heads of even width, got dim 16 and",
        ),
        (["--data.path=corpus.txt", "--model.dim=0"], "LanguageModel: dim must be at least 1, got 0"),
    ],
    ids=lambda value: value[-1].lstrip("-") if isinstance(value, list) else "",
)
def test_text_mistake_gets_one_sentence(mistake: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert failing("fit", f"--config={TINY}", *mistake, capsys=capsys).startswith(message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["fti"],
            "'fti' is not one of fit, validate, test, predict, list, info, doctor, kernels, explain, export. Did you",
        ),
        (["fit"], "no data and model given; name a config, e.g. --config quickstart"),
        (["list", "actvation"], "'actvation' is not one of activation, layer, norm, loss, "),
        (
            ["list", "--paper", "polycon"],
            f"'polycon' is not one of {', '.join(sorted(PAPERS))}. Did you mean 'polycom'?",
        ),
        (["info", "activation", "polynrm"], "no activation is called 'polynrm'. Did you mean 'polynorm'"),
        (["info", "norm", "polynorm"], "'polynorm' is an activation, not a norm."),
        (["export", "runs/x", "-o", "y"], "no checkpoint at runs/x/checkpoints/best.ckpt; train first"),
        (
            ["test", f"--config={TINY}", "--data.path=corpus.txt"],
            "no checkpoint at runs/tiny/checkpoints/last.ckpt; train first",
        ),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_command_mistake_gets_one_sentence(command: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert failing(*command, capsys=capsys).startswith(message)


def test_failed_command_leaves_an_earlier_run_alone(capsys: pytest.CaptureFixture) -> None:
    given = ["fit", f"--config={TINY}", "--data.path=corpus.txt"]
    assert main([*given, "--trainer.max_epochs=1"]) == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    failing(*given, "--run_dir=runs/tiny", capsys=capsys)
    failing(*given, "--model.act=polyrelo", "--ckpt_path=last", capsys=capsys)
    failing(*given, "--data.batch_size=99", "--ckpt_path=last", capsys=capsys)
    after = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    kept = {path for path in before if path.suffix == ".ckpt" or path.name == "metrics.jsonl"}
    assert kept
    assert all(after[path] == before[path] for path in kept)


def test_debug_brings_the_traceback_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(LookupError, match="polyrelo"):
        main(["fit", f"--config={SHAPES}", "--model.act=polyrelo"])
