"""A picture of what layers know over epochs."""

import pandas as pd
from matplotlib.figure import Figure


def draw_usable_information(table: pd.DataFrame) -> Figure:
    """A panel per variable and decoder: layer groups over epochs, in bits, on a scale up to what there is to know.

    Args:
        table: Columns `epoch`, `group`, `variable`, `decoder`, `bits`, `entropy`. Values below 0 are shown as 0; the
            table keeps them.

    Returns:
        The figure.
    """
    panels = list(table.groupby(["variable", "decoder"], sort=False))
    figure = Figure(figsize=(max(4.0, 1.6 + 0.5 * table["epoch"].nunique()) * len(panels), 3.6), layout="constrained")
    for axes, ((variable, decoder), part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        grid = part.pivot(index="group", columns="epoch", values="bits").reindex(part["group"].unique())
        top = max(float(part["entropy"].max()), 1e-9)
        image = axes.imshow(grid.clip(lower=0.0), aspect="auto", vmin=0.0, vmax=top, origin="lower", cmap="viridis")
        every = max(1, len(grid.columns) // 10)
        axes.set_xticks(range(0, len(grid.columns), every), grid.columns[::every])
        axes.set_yticks(range(len(grid)), grid.index)
        axes.set(xlabel="epoch", title=f"{variable} ({decoder} decoder)")
        figure.colorbar(image, ax=axes, label="usable bits")
    return figure
