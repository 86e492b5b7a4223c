"""Tables of the README on what each sample tells."""

from typing import Any

from readme_cells import percent, rows


def label_errors(report: dict[str, Any]) -> str:
    """How well wrong labels are found, and at what cost, by set."""
    names = {
        "last_layer/suspicion": "leave-one-out, surprise of the label",
        "last_layer/squared_residual": "leave-one-out, squared residual",
        "last_layer/weight_information": "unique information in the weights",
        "last_layer/function_information": "unique information in the outputs",
        "trace_2/suspicion": "leave-one-out, trace kernel of all layers",
        "exact/suspicion": "leave-one-out, exact kernel of all layers",
        "training/cumulative_correctness": "cumulative correctness of fine-tuning",
        "training/mean_loss": "mean loss of fine-tuning",
        "training/final_loss": "loss at its end",
        "cleanlab/self_confidence": "cleanlab, cross-validated probe",
        "trak/self_influence": "TRAK self-influence (traker)",
        "ekfac/self_influence": "EK-FAC self-influence (kronfluence)",
    }
    body = []
    for key, text in names.items():
        found = [figures["detectors"].get(key) for figures in report["figures"].values()]
        cells = ["" if one is None else f"{one['auc']:.3f} ({one['seconds']:.0f} s)" for one in found]
        if any(cells):
            body.append([text, *cells])
    return rows(["detector", *report["figures"]], body)


def unique_information(report: dict[str, Any]) -> str:
    """Predicted and measured changes, by set and training."""
    heads = {"small_head": "0.005", "usual_head": "0.02"}
    body = []
    for data, by_head in report["figures"].items():
        for head, spread in heads.items():
            for kind, name in (("lqf", "LQF"), ("finetune", "fine-tuning")):
                for penalty, own in by_head[head].get(kind, {}).items():
                    shown = [f"{own[what]['pearson']:.3f}" for what in ("weights", "predictions")]
                    error = max(own[what]["largest_relative_error"] for what in ("weights", "predictions"))
                    number = str(len(own["samples"]))
                    words = {"none": "none", "penalty": "yes"}[penalty]
                    body.append([data, name, spread, words, number, *shown, f"{error:.1g}"])
    header = ["data", "training", "deviation of the first head", "penalty", "images left out"]
    return rows([*header, "weights", "outputs", "largest relative error"], body)


def summarize(report: dict[str, Any]) -> str:
    """Test accuracy on what is left, by order of removal."""
    names = {"iterative": "least informative, computed anew", "lowest": "least informative, at once"}
    names |= {"random": "by lot", "highest": "most informative"}
    shares = [0.0, 0.5, 0.8]
    body = []
    for data, figures in report["figures"].items():
        for key, text in names.items():
            by_share = {row["share"]: row["accuracy"] for row in figures[key]}
            body.append([data, text, *(percent(by_share[share]) for share in shares)])
    return rows(["data", "removed first", *(f"{share:.0%} removed" for share in shares)], body)


def training_time(report: dict[str, Any]) -> str:
    """Errors of predicted steps, and the cost next to training."""
    names = {"frozen": "fine-tuning", "batch_norm": "fine-tuning, batch statistics", "lqf": "LQF"}
    body = []
    for data, figures in report["figures"].items():
        for key, text in names.items():
            own = figures[key]
            cost = f"{figures['seconds']['trainings_over_all']:.0f}" if key == "frozen" else ""
            errors = [f"{own[what]:.1%}" if what in own else "" for what in ("median", "percentile_95")]
            body.append([data, text, str(own["draws"]), str(own["reached_by_both"]), *errors, cost])
    header = ["data", "training", "draws", "thresholds that both reach", "median error", "95th percentile"]
    return rows([*header, "time of the trainings over that of all predictions"], body)
