"""The membership attack of shadow models: is a cohort's confidence that of models which were trained on it?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.forgetting.attack_area import attack_area
from lqf_lightning.forgetting.shadow_fit import Spread, fit_shadows


@dataclass(frozen=True)
class LikelihoodRatioAttack:
    """What the attack says about a cohort; 0.5 is a model that treats it like samples that it never saw.

    Attributes:
        auc: Area under the curve of the cohort against samples that no model was trained on, by their surprise.
        error: Its standard error (DeLong), samples taken as independent.
        in_out_auc: Area of the model in question against shadow models without the sample, by the likelihood ratio.
        in_out_error: Its standard error over the cohort.
    """

    auc: float
    error: float
    in_out_auc: float
    in_out_error: float


def likelihood_ratio_attack(
    observed: Tensor,
    shadow: Tensor,
    member: Tensor,
    others: Tensor,
    other_shadow: Tensor,
    *,
    spread: Spread = "auto",
) -> LikelihoodRatioAttack:
    r"""Attack one model with the help of shadow models, each trained on a random part of the data.

    Two areas, for two questions. *Against others*: the surprise
    :math:`z = (o - \mu_{out}) / (\sigma_{out} \sqrt{1 + 1/T_{out}})` of every sample of the cohort is compared with
    that of samples outside of all training sets (the offline attack of Carlini et al., 2022, section V-C). Where the
    cohort was drawn by lot, a model without it gives 0.5 exactly in the mean, also if the shadow models saw fewer
    samples than it did, since that shifts both groups alike.

    *In or out*: the score is the likelihood ratio :math:`\log N(o; \mu_{in}, \sigma_{in}) - \log N(o; \mu_{out},
    \sigma_{out})` of the online attack, and the model in question is compared with every shadow model that had not
    seen the sample, fits made without this one (as U-LiRA does for unlearning: Kurmanji et al., 2023; Hayes et al.,
    2024). It knows how hard a sample is, and is stronger; a model without the cohort gives 0.5 in the mean if the
    shadow models are trained like it, on sets of the same size. **The aim is what the retrained model gets.**

    Args:
        observed: `logit_confidence` of the model in question on the cohort (n,).
        shadow: The same of the shadow models (T, n).
        member: Whether a shadow model was trained on the sample (T, n), bool.
        others: Confidences of the model in question on samples that were never trained on (m,).
        other_shadow: The same of the shadow models (T, m).
        spread: Of the normal fits, see `fit_shadows`.

    Returns:
        Both areas, with their errors. Refusals are those of `fit_shadows`.

    Raises:
        ValueError: The shapes do not fit, or a sample has fewer than three shadow models with it or without.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> member = (torch.arange(32)[:, None] + torch.arange(20)) % 2 == 0
        >>> shadow, other = torch.randn(32, 20, generator=draw) + 4 * member, torch.randn(33, 25, generator=draw)
        >>> fresh = torch.randn(20, generator=draw)
        >>> trained = likelihood_ratio_attack(fresh + 4, shadow, member, other[32], other[:32])
        >>> retrained = likelihood_ratio_attack(fresh, shadow, member, other[32], other[:32])
        >>> trained.auc > 0.95, abs(retrained.auc - 0.5) < 2 * retrained.error
        (True, True)
    """
    models = len(shadow)
    if observed.shape != shadow.shape[1:] or others.shape != other_shadow.shape[1:] or len(other_shadow) != models:
        raise ValueError(
            f"expected (n,), (T, n), (m,) and (T, m), got {[tuple(x.shape) for x in (observed, shadow)]} and "
            f"{[tuple(x.shape) for x in (others, other_shadow)]}"
        )
    if min(models - int(member.sum(0).max()), int(member.sum(0).min())) < 3:
        raise ValueError(
            f"every sample needs three of the {models} shadow models with it, three without. Set shadows=64"
        )
    everywhere = torch.cat([member, torch.zeros_like(other_shadow, dtype=torch.bool)], 1)
    together = fit_shadows(torch.cat([shadow, other_shadow], 1), everywhere, spread)
    surprise = together.surprise(torch.cat([observed, others]).double())
    area, error = attack_area(surprise[: len(observed)], surprise[len(observed) :])
    return LikelihoodRatioAttack(area, error, *_in_or_out(observed.double(), shadow.double(), member, spread))


def _in_or_out(observed: Tensor, shadow: Tensor, member: Tensor, spread: Spread) -> tuple[float, float]:
    # Leaving a shadow model out of the fits treats it like the model in question.
    wins = torch.zeros_like(shadow)
    for model in range(len(shadow)):
        kept = torch.arange(len(shadow), device=shadow.device) != model
        fit = fit_shadows(shadow[kept], member[kept], spread)
        ours, theirs = fit.log_ratio(observed), fit.log_ratio(shadow[model])
        wins[model] = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    share = torch.where(member, 0.0, wins).sum(0) / (~member).sum(0)
    error = float(share.std() / len(share) ** 0.5) if len(share) > 1 else 0.5
    return float(share.mean()), max(error, 0.5 / len(share))
