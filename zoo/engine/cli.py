"""`zoo fit | validate | test | predict`: LightningCLI with its traps closed."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .. import (
    data,  # noqa: F401  so that a config may say `class_path: ByteText`
    settings,
    tasks,  # noqa: F401
)
from ..errors import ZooError
from ..registry import factory
from . import rundir
from .callbacks import BestCheckpoint, LastCheckpoint, RandomState, StepMetrics
from .configs import resolve_arguments
from .export import write_predictions
from .jsonl import JSONLLogger
from .parser import ZooParser, fail
from .record import RunRecord
from .report import Report


def main(arguments: list[str]) -> None:
    """Run one command; a user's mistake ends in one paragraph on stderr and exit status 2."""
    _quiet()
    try:
        arguments, configs = resolve_arguments(arguments)
        ZooCLI(arguments, configs)
    except ZooError as error:
        if settings.debug():
            raise
        fail(str(error))


# Beginnings of what Lightning says about its own products and internals, and of what every run would repeat.
_NOISE = ("💡", "Tip:", "TPU available", "`weights_only` was not set", "Loading `train_dataloader` to estimate")


class ZooCLI(LightningCLI):
    """LightningCLI with one directory a run, checkpoints under fixed names, and checks before anything is built.

    Args:
        arguments: the command line, with config files resolved.
        configs: those files.
    """

    def __init__(self, arguments: list[str], configs: list[Path]) -> None:
        self._configs = configs
        self._run_dir = Path()
        self._resuming = False
        self._record = ""
        self._report: Report | None = None
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=ZooParser,
            save_config_callback=None,  # RunRecord writes it, also when the user brings other loggers
            seed_everything_default=0,
            auto_configure_optimizers=False,  # tasks take theirs as arguments
            load_from_checkpoint_support=False,  # tasks save their plain hyper-parameters
            trainer_defaults={"use_distributed_sampler": False},  # our loaders shard themselves
            args=arguments,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without Lightning's warning about `args` beside sys.argv

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Where checkpoints, metrics and the report go (default: runs/<stem of the first config>, numbered).",
        )
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        # at the end of a validation, before LastCheckpoint: a resume then knows of the best so far
        fixed = {"filename": "best", "enable_version_counter": False, "save_on_train_epoch_end": False}
        parser.set_defaults({f"best.{name}": value for name, value in fixed.items()})

    def _parse_ckpt_path(self) -> None:
        """Nothing: a resumed run obeys its config, where Lightning lets the checkpoint's hyper-parameters win."""

    def before_instantiate_classes(self) -> None:
        config = self._options()
        self._check_components(config)
        self._record = self._parser(self.subcommand).dump(config, skip_unset=False)
        fitting = self.subcommand == "fit"
        self._run_dir, checkpoint = rundir.choose(config.run_dir, self._configs, config.ckpt_path, fitting=fitting)
        rundir.check_writable(self._run_dir)
        self._resuming = checkpoint is not None and rundir.holds_run(self._run_dir)
        config.ckpt_path = None if checkpoint is None else str(checkpoint)
        config.trainer.default_root_dir = str(self._run_dir)
        for which in ("best", "last"):
            config[which].dirpath = config[which].dirpath or str(self._run_dir / "checkpoints")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            cause = _first(error)
            # a constructor refused what the config says; anything else is a bug and keeps its traceback
            if settings.debug() or not isinstance(cause, (ZooError, ValueError, TypeError, OSError)):
                raise
            fail(" ".join(str(cause).split()))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._options()
        if config.trainer.logger in (None, True):
            kwargs["logger"] = self._loggers()
        callbacks = list(self.config_init[str(self.subcommand)].trainer.callbacks or [])
        callbacks += [RandomState(), StepMetrics()]
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            record = RunRecord(self._run_dir, self._record, config.seed_everything, resuming=self._resuming)
            self._report = Report(self._run_dir, self._record, config.best.monitor, config.best.mode)
            callbacks += [record, self._report]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def after_fit(self) -> None:
        if self._report is not None and self._report.summary:
            print(self._report.summary)  # here, where the progress bar has said its last

    def before_fit(self) -> None:
        if not self._options().trainer.fast_dev_run and self.trainer.is_global_zero:
            print(f"{'resuming' if self._resuming else 'run'}: {self._run_dir}")

    def _options(self) -> Any:
        """What was asked of the subcommand."""
        return self.config[str(self.subcommand)]

    def predict(self, **kwargs: Any) -> None:
        """Write the predictions to `predictions.safetensors` in the run directory, numbered if there are some."""
        outputs = self.trainer.predict(**kwargs)
        print(f"predictions: {write_predictions(outputs or [], self._run_dir)}")

    def _loggers(self) -> list[Any]:
        from lightning.pytorch.loggers import TensorBoardLogger

        folder = str(self._run_dir)
        if self.subcommand != "fit":
            facts = {"command": str(self.subcommand), "checkpoint": str(self._options().ckpt_path)}
            return [JSONLLogger(folder, "evaluations.jsonl", facts)]
        loggers: list[Any] = [JSONLLogger(folder)]
        if find_spec("tensorboard") is not None:
            loggers.append(TensorBoardLogger(folder, name="", version="", sub_dir="tensorboard"))
        return loggers

    def _check_components(self, config: Any) -> None:
        """Names and arguments of components, before anything is built."""
        module, _, name = config.model.class_path.rpartition(".")
        hints = get_type_hints(getattr(sys.modules[module], name).__init__, include_extras=True)
        for argument, hint in hints.items():
            kind = next((get_args(h)[1] for h in (hint, *get_args(hint)) if get_origin(h) is Annotated), None)
            value = config.model.get("init_args", {}).get(argument)
            if kind is not None and isinstance(value, (str, dict)):
                try:
                    factory(kind, value)
                except ZooError as error:
                    raise type(error)(f"model.{argument}: {error}") from None


def _first(error: BaseException) -> BaseException:
    """The exception that the others were raised from."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _quiet() -> None:
    """Keep what tells a user something."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(_NOISE))
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # lightning 2.6.6 on torch 2.14
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # what a resume means
    warnings.filterwarnings("ignore", message="The '.*dataloader' does not have many workers")  # in-memory data
