"""What others do about wrong labels: cleanlab, TRAK and EK-FAC, as their own examples of finding them do it.

cleanlab sees the predictions of a logistic regression on the same features, five-fold; penalty, and whether features
are scaled to unit variance, are chosen by the held-out likelihood of the labels as they are. TRAK (traker) and EK-FAC
(kronfluence) score how much a sample speaks for itself in the network that ordinary training gave, TRAK over all
parameters, EK-FAC over all convolutions and the last layer. TRAK's projection has fewer numbers than there are samples
(its default of 2048 has more).

    pip install cleanlab==2.9.0 kronfluence==1.0.1 traker==0.3.2
"""

import logging
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from label_errors_parts import CHUNK, Case, Part
from step_cost import clock
from timm.layers import pad_same
from torch import Tensor, nn
from torch.utils.data import TensorDataset

PENALTIES = {"scaled": (1e-3, 1e-2, 1e-1), "plain": (1e-3, 1e-2, 1e-1, 1.0)}  # scikit-learn's C
PROJECTION, TRAK_BATCH = 512, 128  # without a GPU every batch draws the projection anew


def cleanlab_quality(case: Case) -> Part:
    """Label quality by cleanlab from held-out probabilities."""
    from cleanlab.rank import get_label_quality_scores  # an optional package
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    features, _, seconds = case.features
    rows, labels = features.numpy(), case.label.numpy()
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    start, best = clock("cpu"), (-np.inf, np.empty(0), "")
    for scaling, penalties in PENALTIES.items():
        for penalty in penalties:
            scaler = StandardScaler() if scaling == "scaled" else FunctionTransformer()
            probe = make_pipeline(scaler, LogisticRegression(C=penalty, max_iter=1000))
            guess = cross_val_predict(probe, rows, labels, cv=folds, method="predict_proba")
            likelihood = float(np.log(np.clip(guess[np.arange(len(labels)), labels], 1e-12, None)).mean())
            best = max(best, (likelihood, guess, f"{scaling}, C={penalty}"), key=lambda entry: entry[0])
    scores = {
        method: (-get_label_quality_scores(labels, best[1], method=method)).tolist()
        for method in ("self_confidence", "normalized_margin")
    }
    taken = clock("cpu") - start
    settings = sum(len(penalties) for penalties in PENALTIES.values())
    return {"scores": scores, "seconds": seconds + taken, "chosen": best[2], "per_setting": taken / settings}


def trak(case: Case) -> Part:
    """TRAK's self-influence by its authors' package, all layers, projected to 512 numbers."""
    from trak import TRAKer  # an optional package

    model = trained(case)
    with tempfile.TemporaryDirectory() as folder:
        start = clock("cpu")
        traker = TRAKer(
            model=model, task="image_classification", train_set_size=len(case.x), save_dir=folder, device="cpu",
            proj_dim=min(PROJECTION, len(case.x) // 2), use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for rows in torch.arange(len(case.x)).split(TRAK_BATCH):
            traker.featurize(batch=[case.x[rows], case.label[rows]], num_samples=len(rows))
        traker.finalize_features()
        # What its scores would be for the training samples as targets, without taking their gradients once more.
        stored = {name: torch.from_numpy(np.array(rows)) for name, rows in traker.saver.current_store.items()}
        scores = (stored["features"] * stored["grads"]).sum(1) * stored["out_to_loss"].flatten()
        seconds = clock("cpu") - start
    return {"scores": {"self_influence": scores.tolist()}, "seconds": seconds}


def ekfac(case: Case) -> Part:
    """EK-FAC self-influence, all convolutions and the last layer, kronfluence's own settings."""
    from kronfluence.analyzer import Analyzer, prepare_model  # an optional package
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0])
            labels = batch[1]
            if sample:
                labels = torch.multinomial(outputs.detach().softmax(1), 1).flatten()
            return F.cross_entropy(outputs, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)
    task, data = Classification(), TensorDataset(case.x, case.label)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = clock("cpu")
        analyzer = Analyzer(
            "label_errors", prepare_model(pad_apart(trained(case)), task), task, cpu=True, disable_tqdm=True,
            output_dir=folder,
        )  # fmt: skip
        options = {"per_device_batch_size": CHUNK, "factor_args": FactorArguments(strategy="ekfac")}
        analyzer.fit_all_factors("factors", data, **options)
        analyzer.compute_self_scores("scores", "factors", data, per_device_train_batch_size=CHUNK)
        scores = analyzer.load_self_scores("scores")["all_modules"]
        seconds = clock("cpu") - start
    return {"scores": {"self_influence": scores.flatten().tolist()}, "seconds": seconds}


def trained(case: Case) -> nn.Module:
    """The network as ordinary training left it, in evaluation mode."""
    case.network.load_state_dict(torch.load(case.work / "network.pt"))
    return case.network.eval()


class SamePadding(nn.Module):
    """The padding that TensorFlow gives a convolution, by itself."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.sizes = [list(size) for size in (convolution.kernel_size, convolution.stride, convolution.dilation)]

    def forward(self, x: Tensor) -> Tensor:
        """Pad with zeros."""
        kernel, stride, dilation = self.sizes
        return pad_same(x, kernel, stride, dilation)


def pad_apart(model: nn.Module) -> nn.Module:
    """Take the padding out of timm's own convolutions, of which kronfluence knows the plain kind only."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
            plain = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, 0, module.dilation,
                module.groups, module.bias is not None,
            )  # fmt: skip
            plain.load_state_dict(module.state_dict())
            model.set_submodule(name, nn.Sequential(SamePadding(module), plain))
    return model
