"""Everything is in pyproject.toml but this: the recipes are installed as ``adaptkit.recipes``."""

from setuptools import find_namespace_packages, find_packages, setup

recipes = [
    "adaptkit.recipes",
    *(f"adaptkit.recipes.{name}" for name in find_namespace_packages("recipes", include=["bench"])),
]
setup(packages=[*find_packages(include=["adaptkit*"]), *recipes])
