"""How accurate LQF is on real images, beside linear and fine-tuned baselines, by running `lqf-train` itself.

Each case is one process of `lqf-train`, so the figures are those that a user gets. Fine-tuning is tuned: four learning
rates, then twice the epochs, by validation accuracy (ties by loss). LQF is not: its options are the same for all sets.
Finished cases are kept in the work folder, and an interrupted benchmark goes on where it was. Without `--folder` it
runs scikit-learn's digits, which need no download.

    python benchmarks/accuracy.py [--quick] [--folder NAME=PATH:SIZE[:AUGMENTATION[:SHARE[:CROP]]] ...]
        [--backbone NAME] [--leaky FILE] [--rows KEY ...] [--shots NAME ...] [--core NAME ...] [--once NAME ...]
        [--work DIR] [--output FILE]

The last line printed is one JSON object.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_figures import claims, mean_error, medians, paired_interval, relative_increase
from accuracy_plan import DRAWS, EPOCHS, LINEAR, RATES, SHOTS, ImageSet, finetune, image_sets, rows
from accuracy_runs import answers, drop_checkpoints, run
from written_report import write_report


def tuned(
    folder: Path, data: ImageSet, shared: list[str], seeds: int, quick: bool, *, few: bool = False
) -> list[dict[str, Any]]:
    """Fine-tune with every learning rate, choose by validation accuracy, then run the other seeds.

    With few images three rates at twice the epochs, else four, and then twice the epochs for the best.
    """

    def at(rate: float, epochs: int, seed: int) -> dict[str, Any]:
        case = folder / "finetune" / f"lr{rate:g}_e{epochs}" / f"seed{seed}"
        found = run(case, [*data.data, *shared, *finetune(rate, epochs, data), f"seed={seed}"])
        drop_checkpoints(case)
        return found | {"rate": rate, "epochs": epochs}

    def quality(found: dict[str, Any]) -> tuple[float, float]:
        return found["val/acc"], -found["val/loss"]

    epochs = 1 if quick else EPOCHS * (2 if few else 1)
    rates = RATES[1:] if few else RATES
    tried = [at(rate, epochs, 0) for rate in (rates[:1] if quick else rates)]
    best = max(tried, key=quality)
    if not (quick or few):
        tried.append(at(best["rate"], 2 * epochs, 0))
        best = max(best, tried[-1], key=quality)
    found = [best, *(at(best["rate"], best["epochs"], seed) for seed in range(1, seeds))]
    return [{**each, "search_seconds": sum(one["time/fit_s"] for one in tried)} for each in found]


def row_of(found: list[dict[str, Any]], baseline: float) -> dict[str, Any]:
    """The figures of one row: errors in percent, seconds of training."""
    error = mean_error(found)
    return {
        "error": error, "seeds": len(found), "errors": [100 * (1 - each["test/acc"]) for each in found],
        "relative": relative_increase(error, baseline),
        "seconds": statistics.fmean(each["time/fit_s"] for each in found),
        "relative_gradient": found[0].get("train/relative_gradient"),
    }  # fmt: skip


def measure(folder: Path, data: ImageSet, options: argparse.Namespace, shared: list[str]) -> dict[str, Any]:
    """All rows on one image set."""
    seeds = 1 if options.quick or data.name in options.once else options.seeds
    baseline = tuned(folder, data, shared, seeds, options.quick)
    error = mean_error(baseline)
    table = {"finetune": row_of(baseline, error)}
    table["finetune"] |= {name: baseline[0][name] for name in ("rate", "epochs", "search_seconds")}
    known, loo = {}, {}
    for key, row in rows(options.leaky).items():
        if options.rows and not {key, f"{data.name}/{key}"} & set(options.rows):
            continue
        extra = ["trainer.max_epochs=1"] if options.quick else []
        extra += [f"data/augmentation={data.augmentation}"] if row.augmented else []
        found, folders = [], [folder / key / f"seed{seed}" for seed in range(min(row.seeds, seeds))]
        for seed, case in enumerate(folders):
            overrides = [*data.data, *shared, *row.overrides, *extra, f"seed={seed}"]
            found.append(run(case, overrides, observe=("learning_curves", *row.observe)))
            drop_checkpoints(case)
        table[key], known[key] = row_of(found, error) | {"name": row.name}, [answers(case) for case in folders]
        if "test/linear_probe_acc" in found[0] and key == "learned":
            probes = [each | {"test/acc": each["test/linear_probe_acc"]} for each in found]
            table["probe"] = row_of(probes, error) | {"name": "linear probe", "seconds": 0.0}
            loo = {name: found[0][name] for name in ("train/loo_acc", "train/probe_loo_acc") if name in found[0]}
            loo |= json.loads((folders[0] / "outlook.json").read_text()) if loo else {}
        print(data.name, key, table[key], flush=True)
    if data.name in options.core:
        both = around_core(folder / "core", data, shared, options.quick)
        table["core"] = row_of([both], error) | {"name": "LQF around a core", "core": 100 * (1 - both["core/test/acc"])}
    against = {
        key: paired_interval(known["learned"], known[key]) for key in ("head", "gaf") if {key, "learned"} <= set(known)
    }
    return {"rows": table, "against": against, "leave_one_out": loo}


def around_core(folder: Path, data: ImageSet, shared: list[str], quick: bool) -> dict[str, Any]:
    """LQF on all images, around weights that were fine-tuned on half of them: judged by the others' leave-one-out."""
    half = [*data.data, *shared, "data.core={fraction:0.5,seed:0}", "seed=0"]
    steps = finetune(0.01, 1 if quick else 8, data)
    first = run(folder / "first", [*half, "data.part=core", *steps])
    weights = f"backbone.weights={folder / 'first' / 'checkpoints' / 'last.ckpt'}"
    found = run(folder / "seed0", [*half, *LINEAR, weights])
    drop_checkpoints(folder / "seed0")
    return found | {"core/test/acc": first["test/acc"], "time/fit_s": found["time/fit_s"] + first["time/fit_s"]}


def few_shots(folder: Path, data: ImageSet, shared: list[str], quick: bool) -> dict[str, Any]:
    """Errors of LQF, its head alone, and tuned fine-tuning with a few images per class."""
    result: dict[str, Any] = {}
    data = replace(data, data=tuple(one for one in data.data if not one.startswith("data.subset_ratio")))
    for number in SHOTS[:1] if quick else SHOTS:
        few = [*shared, f"data.shots={number}"]
        place = folder / f"shots{number}"
        drawn = [[f"data.subset_seed={seed}", f"seed={seed}"] for seed in range(1 if quick else DRAWS)]
        entry: dict[str, Any] = {}
        for key, overrides in (("learned", LINEAR), ("head", (*LINEAR, "method.layers=[head]"))):
            found = []
            for seed, draw in enumerate(drawn):
                case = place / key / f"seed{seed}"
                found.append(run(case, [*data.data, *few, *overrides, *draw]))
                drop_checkpoints(case)
            entry[key] = mean_error(found)
            entry[f"{key}_seconds"] = statistics.fmean(each["time/fit_s"] for each in found)
        tuning = [
            tuned(place / f"draw{seed}", data, [*few, draw[0]], 1, quick, few=True)[0]
            for seed, draw in enumerate(drawn)
        ]
        entry["finetune"] = mean_error(tuning)
        entry["finetune_seconds"] = statistics.fmean(each["search_seconds"] for each in tuning)
        result[str(number)] = entry
        print(data.name, number, entry, flush=True)
    return result


def main() -> None:
    """Run all cases and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: few digits, three rows, one epoch, no claims"
    )
    parser.add_argument("--folder", action="append", default=[], help="NAME=PATH:SIZE[:AUGMENTATION[:SHARE[:CROP]]]")
    parser.add_argument("--no-digits", dest="digits", action="store_false", help="only the folders")
    parser.add_argument("--size", type=int, default=64, help="pixels of the digits")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="a config of ours, with overrides after ','")
    parser.add_argument("--leaky", type=Path, help="weights that lqf-adapt has written for it")
    parser.add_argument("--rows", nargs="*", default=[], help="only these rows: KEY, or SET/KEY for one set")
    parser.add_argument("--shots", nargs="*", default=[], help="sets that are measured with few shots as well")
    parser.add_argument("--core", nargs="*", default=[], help="sets where half of the images are fine-tuned on first")
    parser.add_argument("--once", nargs="*", default=[], help="sets with one seed for every row")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    backbone, *extra = options.backbone.split(",")
    shared = [f"backbone={backbone}", *extra]
    if options.quick and not options.rows:
        options.rows = ["learned", "head", "gaf"]
    sets: dict[str, Any] = {}
    shots: dict[str, Any] = {}
    for data in image_sets(options):
        if options.quick:
            data = ImageSet(data.name, (*data.data, "data.subset_ratio=0.07", "data.image_size=32"), data.augmentation)
        folder = (options.work / ("quick" if options.quick else backbone) / data.name).absolute()
        sets[data.name] = measure(folder, data, options, shared)
        if data.name in options.shots:
            shots[data.name] = few_shots(folder, data, shared, options.quick)
    report = {
        "benchmark": "accuracy", "quick": options.quick, "backbone": options.backbone, "cases": sets, "shots": shots,
        "medians": medians(sets), "claims": [] if options.quick else claims(sets, shots),
    }  # fmt: skip
    write_report(report, options.output)


if __name__ == "__main__":
    main()
