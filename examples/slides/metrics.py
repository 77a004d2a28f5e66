"""The two measures of the paper: Spearman's rank correlation, and the AUC of each class against the rest."""

import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score


def spearman(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Rank correlation of two vectors; NaN where one of them is constant.

    >>> spearman(torch.tensor([0.1, 0.2, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
    1.0
    """
    if len(predicted.unique()) < 2 or len(labels.unique()) < 2:
        return float("nan")
    return float(spearmanr(predicted.double().numpy(), labels.double().numpy()).statistic)


def auc_per_class(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Area under the ROC curve of each class against the rest, logits [N, classes]; NaN for an absent class.

    >>> auc_per_class(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1]))
    [1.0, 1.0]
    """
    shares = logits.double().softmax(1)
    return [one_against_rest(shares[:, i], labels == i) for i in range(logits.shape[1])]


def one_against_rest(share: torch.Tensor, positive: torch.Tensor) -> float:
    if positive.all() or not positive.any():
        return float("nan")
    return float(roc_auc_score(positive.numpy(), share.numpy()))
