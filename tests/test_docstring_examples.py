import doctest
import importlib
import pkgutil

import lqf_lightning.callbacks
import pytest

import lqf_lightning

PACKAGES = (lqf_lightning, lqf_lightning.callbacks)
MODULES = sorted({m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")})


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    if not name.endswith("__main__"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_mathematics_has_examples():
    tried = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES if ".linear." in name)
    assert tried >= 10
