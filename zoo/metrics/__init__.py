"""Metrics as torchmetrics has them: classes that add up over batches and processes, each with a function a batch.

Of heatmaps (class activation maps). Files: `confidence_change.py`, `deletion.py` and `remove_and_debias.py` run the
model on changed images, `localisation.py` compares with boxes and masks, `repeatability.py` with a second map;
`average.py` is what the classes are, `confidence.py`, `perturbation.py`, `baseline.py`, `imputation.py`, `heatmaps.py`
and `regions.py` what they are made of.
"""

from .confidence_change import AverageDrop, IncreaseInConfidence, average_drop, increase_in_confidence
from .deletion import DeletionAUC, InsertionAUC, deletion_auc, insertion_auc
from .imputation import linear_imputation
from .localisation import (
    EnergyPointingGame,
    GridPointingGame,
    InstanceRecall,
    PointingGame,
    energy_pointing_game,
    grid_pointing_game,
    instance_recall,
    pointing_game,
)
from .remove_and_debias import Road, road
from .repeatability import Stability, stability

__all__ = [
    "AverageDrop",
    "DeletionAUC",
    "EnergyPointingGame",
    "GridPointingGame",
    "IncreaseInConfidence",
    "InsertionAUC",
    "InstanceRecall",
    "PointingGame",
    "Road",
    "Stability",
    "average_drop",
    "deletion_auc",
    "energy_pointing_game",
    "grid_pointing_game",
    "increase_in_confidence",
    "insertion_auc",
    "instance_recall",
    "linear_imputation",
    "pointing_game",
    "road",
    "stability",
]
