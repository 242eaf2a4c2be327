"""The losses: pure functions of log-probabilities, one value per pair (or answer), and the table that names them."""

from prefloop.train.losses.logps import PairLogps, pair_metrics
from prefloop.train.losses.table import LOSSES, SHORT, ChosenLoss, parse_loss
from prefloop.train.losses.unpaired import AnswerLogps

__all__ = ["LOSSES", "SHORT", "AnswerLogps", "ChosenLoss", "PairLogps", "pair_metrics", "parse_loss"]
