"""Attacks on classifiers, for adversarial training and for its evaluation.

Files: `pgd.py` the attack of training, `apgd.py` the parameter-free one of evaluation, `evaluate.py` accuracy under
attacks, `objectives.py` what they maximise, `ball.py` where they may go, `modes.py` and `scores.py` the model
meanwhile.
"""

from .apgd import APGDAttack, mini_autoattack
from .evaluate import evaluate_robustness, robust_accuracy
from .pgd import Perturbation, PGDAttack, make_attack

__all__ = [
    "APGDAttack",
    "PGDAttack",
    "Perturbation",
    "evaluate_robustness",
    "make_attack",
    "mini_autoattack",
    "robust_accuracy",
]
