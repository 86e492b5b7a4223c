"""Config groups of other installed packages.

A distribution that declares ``[project.entry-points."lqf_lightning.configs"]`` with a package of YAML files as value
adds its groups to ours: ``lqf-train method=theirs`` works, in ``--help``, completion and sweeps too.
"""

from importlib.metadata import entry_points

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class EntryPointConfigs(SearchPathPlugin):
    """Appends the config packages named by entry points to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add one entry per declared package.

        Args:
            search_path: Hydra's search path, changed in place.
        """
        for entry in entry_points(group="lqf_lightning.configs"):
            search_path.append(provider=entry.name, path=f"pkg://{entry.value}")


def register_plugins() -> None:
    """Let Hydra find the config groups of other packages; repeated calls do nothing more."""
    if EntryPointConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(EntryPointConfigs)
