"""The scores of the tasks, by the protocols that papers publish: `adaptkit eval` and the recipes' own validation."""
